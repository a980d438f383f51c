"""The commands of ``omnimoe``, a module each: ``add_arguments(parser)`` and ``run(args) -> int``."""

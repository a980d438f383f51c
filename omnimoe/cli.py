"""The command line: ``omnimoe COMMAND``, with the commands of :data:`COMMANDS`.

A command is a module of ``omnimoe.commands`` with ``add_arguments(parser)`` and ``run(args) -> int``. It is imported
only when it is asked for, so that ``omnimoe --help`` answers at once.
"""

from __future__ import annotations

import argparse
import importlib
import logging
import os
import sys
from collections.abc import Sequence

from omnimoe.plugins import load_file

COMMANDS = {
    "quickstart": "train a small Mixture-of-Transformers beside its dense twin, on real data, in under five minutes",
    "list": "list the model zoo",
    "info": "sizes, FLOPs, modalities, paper and licence of one model",
    "train": "train a model of the zoo, or one declared in a JSON file",
    "compare": "train several architectures on the same data and compare the steps they need",
    "generate": "make text, pictures or speech from text, pictures or speech",
    "convert": "write a published checkpoint as one of ours, or one of ours as it was published",
    "eval": "measure models on held-out data: loss, retrieval, generated pictures and speech",
    "demo": "try a model on a page in the browser",
    "data": "build or look at a corpus",
    "bench": "time routed experts beside other libraries', after holding them against float64",
    "build": "compile the kernels now and not on first use",
    "doctor": "say what is installed and whether it fits, which kernels are used and why not others, what plugs in",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command.

    Args:
        arguments: what follows ``omnimoe`` on the command line; taken from there where None.

    Returns:
        0 on success, 1 after a failure at run time, 2 for a wrong call, 130 after Ctrl-C.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    parser = _parser(only=given[0] if given and given[0] in COMMANDS else None)
    args = parser.parse_args(given)
    if args.command is None:
        parser.print_help()
        return 0
    if not sys.stderr.isatty():
        # libraries draw their bars into files too unless they are told not to
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    # idle threads of PyTorch's pool spin by default: where another program wants a core, a step takes ten times as long
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    logging.basicConfig(level=logging.INFO if args.verbose else logging.WARNING, format="%(message)s")
    try:
        for path in args.parts:
            load_file(path)
        return importlib.import_module(f"omnimoe.commands.{args.command}").run(args)
    except BrokenPipeError:
        # whoever read our output, such as head, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        print("omnimoe: interrupted", file=sys.stderr)
        return 130
    except (ValueError, OSError, RuntimeError, ImportError) as error:
        if args.verbose:
            raise
        print(f"omnimoe {args.command}: {error}", file=sys.stderr)
        return 2 if isinstance(error, ValueError) else 1


def _parser(only: str | None) -> argparse.ArgumentParser:
    import omnimoe

    parser = argparse.ArgumentParser(
        prog="omnimoe",
        description="Load, train, extend, compare and run modality-aware sparse multimodal models.",
        epilog="'omnimoe COMMAND --help' tells more of a command. Start with 'omnimoe quickstart'.",
    )
    parser.add_argument("--version", action="version", version=f"omnimoe {omnimoe.__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", title="commands")
    for name, summary in COMMANDS.items():
        command = commands.add_parser(
            name,
            help=summary,
            description=summary[0].upper() + summary[1:] + ".",
            formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        )
        if name == only:
            importlib.import_module(f"omnimoe.commands.{name}").add_arguments(command)
        told = "a Python file that registers parts or models of your own, imported first; may be given several times"
        command.add_argument("--parts", action="append", default=[], metavar="FILE", help=told)
        command.add_argument("--verbose", action="store_true", help="tell more, and show where an error came from")
    return parser


if __name__ == "__main__":
    sys.exit(main())

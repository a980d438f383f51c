"""Other libraries' kernels behind our contracts: taken only when asked for by name, imported only then.

    with omnimoe.backend("liger"):
        y = experts_mlp(...)

A library that is missing, or cannot do what it is given, is a reason in ``omnimoe doctor`` and a ``BackendError``.
"""

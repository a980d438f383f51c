"""Names that load on first use, so that importing a package costs nothing."""

from __future__ import annotations

import difflib
import importlib
import sys
from collections.abc import Callable, Mapping, Sequence
from types import ModuleType
from typing import Any


def lazy(
    package: str, homes: Mapping[str, Sequence[str]]
) -> tuple[Callable[[str], Any], Callable[[], list[str]], list[str]]:
    """What a package's ``__getattr__``, ``__dir__`` and ``__all__`` must be.

    Args:
        package: ``__name__`` of the package.
        homes: module to the public names it defines.

    Returns:
        The three.
    """
    where = {name: module for module, names in homes.items() for name in names}

    class Package(ModuleType):
        """A submodule called like a public name it defines (``omnimoe.flops``) would take that name's place."""

        def __setattr__(self, name: str, value: object) -> None:
            if isinstance(value, ModuleType) and where.get(name) == value.__name__:
                value = getattr(value, name)
            super().__setattr__(name, value)

    def load(name: str) -> Any:
        if name not in where:
            near = difflib.get_close_matches(name, where, n=1)
            known = f"did you mean {near[0]!r}?" if near else f"it has {', '.join(sorted(where))}"
            raise AttributeError(f"module {package!r} has no attribute {name!r}; {known}")
        value = getattr(importlib.import_module(where[name]), name)
        setattr(sys.modules[package], name, value)
        return value

    sys.modules[package].__class__ = Package
    return load, lambda: sorted({*vars(sys.modules[package]), *where}), sorted(where)

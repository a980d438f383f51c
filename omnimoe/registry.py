"""One table per extension point. A taken name raises, an unknown name raises and suggests the nearest."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterator
from typing import Generic, TypeVar

from omnimoe.plugins import load_plugins

T = TypeVar("T")

_NAME = re.compile(r"[a-z0-9][a-z0-9_.\-]*")


class RegistryError(ValueError):
    """A name that is malformed, taken or unknown."""


class Registry(Generic[T]):
    """Maps names to parts of one kind.

    Args:
        kind: what the table holds, in the singular, for messages: ``"router"``.

    Example:
        >>> shapes = Registry("shape")
        >>> shapes.register("circle")(str).__name__
        'str'
        >>> shapes.get("circel")
        Traceback (most recent call last):
        omnimoe.registry.RegistryError: unknown shape 'circel'; did you mean 'circle'? Known: circle
    """

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self._parts: dict[str, T] = {}
        self._loaders: list[Callable[[], object]] = []

    def register(self, name: str, *, exist_ok: bool = False) -> Callable[[T], T]:
        """Decorator that files a part under ``name``.

        Args:
            name: lower-case letters, digits, ``_``, ``.`` and ``-``, the first a letter or digit.
            exist_ok: replace a part of the same name, a built-in one too, instead of raising.

        Raises:
            RegistryError: if the name is malformed or taken.
        """
        if not isinstance(name, str):
            raise RegistryError(f"a {self.kind} is registered under a name, not under {name!r}; write register(name)")
        if not _NAME.fullmatch(name):
            raise RegistryError(f"{self.kind} name {name!r} may only hold lower-case letters, digits, '_', '.' and '-'")

        def file_under(part: T) -> T:
            if exist_ok:
                # A built-in part that loads later would find its own name taken by its replacement.
                self._load()
            taken = self._parts.get(name)
            if taken is not None and taken is not part and not exist_ok:
                raise RegistryError(
                    f"{self.kind} {name!r} is already registered as {_describe(taken)}; "
                    "choose another name or pass exist_ok=True"
                )
            self._parts[name] = part
            return part

        return file_under

    def on_first_use(self, loader: Callable[[], object]) -> None:
        """Runs ``loader`` once before the first look-up, so that built-in parts need not be imported early."""
        self._loaders.append(loader)

    def get(self, name: str) -> T:
        """The part filed under ``name``.

        Raises:
            RegistryError: if nothing is; the message names the nearest known names.
        """
        if name in self:
            return self._parts[name]
        raise RegistryError(f"unknown {self.kind} {name!r}{self.hint(name)}")

    def hint(self, name: str) -> str:
        """The tail of an error about ``name``: the nearest names, then some of those known."""
        names = self.names()
        near = difflib.get_close_matches(str(name), names, n=3, cutoff=0.5)
        meant = f"; did you mean {' or '.join(map(repr, near))}?" if near else ";"
        known = ", ".join(names[:12]) + (f" and {len(names) - 12} more" if len(names) > 12 else "")
        return f"{meant} Known: {known or 'none yet'}"

    def names(self) -> list[str]:
        """All names, those of plugins too, sorted."""
        self._load()
        load_plugins()
        return sorted(self._parts)

    def remove(self, name: str) -> None:
        """Forgets ``name``; for tests and notebooks that register the same part twice."""
        self.get(name)
        del self._parts[name]

    def __contains__(self, name: object) -> bool:
        self._load()
        if name not in self._parts:
            load_plugins()
        return name in self._parts

    def __iter__(self) -> Iterator[str]:
        return iter(self.names())

    def _load(self) -> None:
        while self._loaders:
            # Out of the list while it runs, for a part may look up another of the same kind as it is defined.
            loader = self._loaders.pop(0)
            try:
                loader()
            except BaseException:
                self._loaders.insert(0, loader)
                raise


def _describe(part: object) -> str:
    module, name = getattr(part, "__module__", ""), getattr(part, "__qualname__", None)
    return f"{module}.{name}" if name else repr(part)

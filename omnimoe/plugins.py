"""Plugins: installed packages that register parts, found through the entry point group ``omnimoe.plugins``.

A package names a module under that group, and importing the module registers whatever it brings. Every table of parts
looks here before it says that a name is unknown, so a plugin's parts are there without an import.
"""

from __future__ import annotations

import importlib.metadata
import logging
import sys
from dataclasses import dataclass

PLUGINS = "omnimoe.plugins"
"""The entry point group."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Plugin:
    """What became of a plugin.

    Args:
        name: of the entry point.
        value: the module that it names.
        package: the distribution that declares it, with its version.
        error: why it could not be loaded; empty if it was.
    """

    name: str
    value: str
    package: str = ""
    error: str = ""


_tried: dict[tuple[str, str], Plugin] = {}
_places: list[tuple[str, ...]] = []


def load_plugins(*, again: bool = False) -> tuple[Plugin, ...]:
    """Imports the plugins that were not tried before. One that fails is logged, and the others are loaded.

    Args:
        again: look for installed packages anew, though ``sys.path`` is what it was.

    Returns:
        All that were found up to now.
    """
    path = tuple(sys.path)
    if path in _places and not again:
        return tuple(_tried.values())
    _places.append(path)
    for found in importlib.metadata.entry_points(group=PLUGINS):
        key = found.name, found.value
        if key in _tried:
            continue
        origin = getattr(found, "dist", None)
        told = Plugin(found.name, found.value, f"{origin.name} {origin.version}" if origin else "")
        _tried[key] = told  # what it imports may look for plugins too
        try:
            found.load()
        except (Exception, SystemExit) as error:
            message = "the plugin %r (%s) failed to load; parts that it did not come to register are missing"
            logger.warning(message, found.name, found.value, exc_info=True)
            _tried[key] = Plugin(told.name, told.value, told.package, f"{type(error).__name__}: {error}")
    return tuple(_tried.values())

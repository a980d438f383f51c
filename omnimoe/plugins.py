"""Plugins: installed packages that register parts, found through the entry point group ``omnimoe.plugins``.

A package names a module under that group, and importing the module registers whatever it brings. Every table of parts
looks here before it says that a name is unknown, so a plugin's parts are there without an import. A single file of
one's own is imported by its path, as ``--parts`` of every command does.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import logging
import re
import sys
from dataclasses import dataclass
from pathlib import Path

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


def load_file(path: Path | str) -> str:
    """Imports a Python file, which registers whatever it brings; once, however often it is asked for.

    Args:
        path: of the file.

    Returns:
        The name of its module.

    Raises:
        ValueError: if there is no such file, or it fails; the message names the file.
    """
    place = Path(path).resolve()
    name = "omnimoe_parts." + re.sub(r"\W", "_", str(place.with_suffix("")))
    if name in sys.modules:
        return name
    spec = importlib.util.spec_from_file_location(name, place)
    if spec is None or spec.loader is None or not place.is_file():
        raise ValueError(f"{path} is no Python file that could be imported; name one that registers parts")
    sys.modules[name] = module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        del sys.modules[name]
        raise ValueError(f"{path} could not be imported, {type(error).__name__}: {error}") from error
    return name

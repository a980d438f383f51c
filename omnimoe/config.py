"""Configs: frozen, keyword-only dataclasses nested in the class they build.

A config holds plain values and other configs only, so it round-trips through JSON. ``config.build(...)`` makes the
part; a part that is registered writes its name as ``"type"``, so a file can name a router of somebody else's package.
"""

from __future__ import annotations

import collections.abc
import dataclasses
import difflib
import inspect
import math
import numbers
import re
import sys
import types
import typing
from collections.abc import Callable, Iterable
from typing import Any, ClassVar, Self, TypeVar

from omnimoe.registry import Registry

Part = TypeVar("Part", bound="Configurable")


class ConfigError(ValueError):
    """A config with an unknown field, a value out of range, or fields that contradict each other."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Base of all configs. Subclass it as a nested class named ``Config`` of a :class:`Configurable`."""

    target: ClassVar[type]
    """The class that :meth:`build` makes; set when that class is defined."""

    def __post_init__(self) -> None:
        """Refuses values of another type than a field is annotated with; an own check calls this one first.

        Raises:
            ConfigError: with the field, its type and the value.
        """
        check_types(self, [field.name for field in dataclasses.fields(self)])

    def check_positive(self, *names: str) -> None:
        """Refuses fields below 1; one that is None passes.

        Raises:
            ConfigError: with the first of them and its value.
        """
        for name in names:
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name} must be at least 1, got {value}")

    def check_not_negative(self, *names: str) -> None:
        """Refuses fields below 0, and those without an end.

        Raises:
            ConfigError: with the first of them and its value.
        """
        for name in names:
            if not 0 <= getattr(self, name) < math.inf:
                raise ConfigError(f"{name} must be finite and not negative, got {getattr(self, name)}")

    def build(self, **built: Any) -> Any:
        """Makes the part this config describes, passing ``built`` (widths and counts known to the parent).

        Raises:
            ConfigError: if the config only groups values and no class is made from it.
        """
        target = getattr(self, "target", None)
        if target is None:
            raise ConfigError(f"{type(self).__qualname__} groups values, nothing is built from it; nest it in a class")
        return target(self, **built)

    def replace(self, **changes: Any) -> Self:
        """A copy with some fields changed.

        Raises:
            ConfigError: if a field does not exist; the message names the nearest one.
        """
        self._check_fields(changes)
        return dataclasses.replace(self, **changes)

    def to_dict(self) -> dict[str, Any]:
        """Plain values that ``json.dumps`` takes, with ``"type"`` first where the part is registered.

        Raises:
            ConfigError: if a field holds anything but plain values and configs, or the part belongs to a registry and
                is not registered, so that :meth:`from_dict` could not find it.
        """
        target = getattr(self, "target", None)
        name, registry = getattr(target, "registered_name", None), getattr(target, "registry", None)
        if registry is not None and name is None:
            raise ConfigError(f"{type(self).__qualname__} cannot be stored: its class is no registered {registry.kind}")
        plain: dict[str, Any] = {"type": name} if name else {}
        for field in dataclasses.fields(self):
            plain[field.name] = _to_plain(getattr(self, field.name), f"{type(self).__qualname__}.{field.name}")
        return plain

    @classmethod
    def from_dict(cls, plain: dict[str, Any]) -> Self:
        """The inverse of :meth:`to_dict`.

        Lists become tuples, which is what configs hold.

        Raises:
            RegistryError: if the type is unknown; the message names the nearest ones.
            ConfigError: if a field is unknown or missing, the type is missing, or names a part of another kind.
        """
        if not isinstance(plain, dict):
            raise ConfigError(f"{cls.__qualname__} is read from a mapping, not from {plain!r}")
        fields = dict(plain)
        target = getattr(cls, "target", None)
        registry: Registry | None = getattr(target, "registry", None)
        if registry is not None and "type" in fields:
            name = fields.pop("type")
            if not isinstance(name, str):
                raise ConfigError(
                    f"the type of {cls.__qualname__}, {name!r}, is no {registry.kind} name; write a string"
                )
            part = registry.get(name)
            if not issubclass(part, typing.cast(type, target)):
                raise ConfigError(
                    f"{cls.__qualname__} is wanted, and {registry.kind} {name!r} names class {part.__qualname__}"
                )
            cls = part.Config
        elif registry is not None and getattr(target, "registered_name", None) is None:
            raise ConfigError(f"{cls.__qualname__} needs a 'type': one of {', '.join(registry.names())}")
        cls._check_fields(fields)
        values = {name: _from_plain(value, _type_hint(cls, name)) for name, value in fields.items()}
        missing = [field.name for field in dataclasses.fields(cls) if field.name not in values and _is_required(field)]
        if missing:
            raise ConfigError(f"{cls.__qualname__} needs a value for {', '.join(missing)}")
        for name, value in values.items():
            _check_type(cls, name, value)
        return cls(**values)

    @classmethod
    def _check_fields(cls, given: dict[str, Any]) -> None:
        known = [field.name for field in dataclasses.fields(cls)]
        for name in given:
            if name not in known:
                near = difflib.get_close_matches(name, known, n=1)
                meant = f"; did you mean {near[0]!r}?" if near else ";"
                raise ConfigError(f"{cls.__qualname__} has no field {name!r}{meant} Fields: {', '.join(known)}")


class Configurable:
    """A class whose knobs are its nested ``Config``; without one it gets an own, empty extension of its parent's."""

    Config: ClassVar[type[Config]]
    registry: ClassVar[Registry | None] = None
    registered_name: ClassVar[str | None] = None

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        parent = getattr(cls, "Config", Config)
        # A config that another class owns, named in the body, must go on building that class.
        if "Config" not in cls.__dict__ or "target" in parent.__dict__:
            qualname = f"{cls.__qualname__}.Config"
            body = {"__qualname__": qualname, "__module__": cls.__module__, "__doc__": parent.__doc__}
            cls.Config = dataclasses.dataclass(frozen=True, kw_only=True)(type("Config", (parent,), body))
        if "registered_name" not in cls.__dict__:
            cls.registered_name = None
        cls.Config.target = cls


def register(registry: Registry, name: str, *, exist_ok: bool = False) -> Callable[[type[Part]], type[Part]]:
    """Decorator that files a :class:`Configurable` class under ``name`` and writes the name on it.

    Raises:
        RegistryError: if the name is malformed or taken.
        TypeError: if what is decorated is no :class:`Configurable` class, or belongs to another registry.
    """

    def file_under(part: type[Part]) -> type[Part]:
        if not (isinstance(part, type) and issubclass(part, Configurable)):
            raise TypeError(f"{registry.kind} {name!r} must be a class with a nested Config, not {part!r}")
        if part.registry is not None and part.registry is not registry:
            raise TypeError(f"{part.__qualname__} cannot be {registry.kind} {name!r}; its kind is {part.registry.kind}")
        registry.register(name, exist_ok=exist_ok)(part)
        part.registered_name = name
        return part

    return file_under


COUNT_LIMIT = 2**20
"""Of fields whose names start with ``num_``: a config that was damaged or made to hurt asks for more."""
SIZE_LIMIT = 2**40
"""Of all other whole numbers."""
_ADDED_BY_NORMS = re.compile(r"(\w+_)?eps")
_BASES_OF_ANGLES = re.compile(r"(\w+_)?theta")


def check_types(config: Any, names: Iterable[str]) -> None:
    """Refuses values of another type than their fields are annotated with, ``"64"`` for a number, and absurd numbers.

    Raises:
        ConfigError: with the field, its type and the value.
    """
    for name in names:
        _check_type(type(config), name, getattr(config, name))


def _check_type(cls: type, name: str, value: Any) -> None:
    if not _fits(value, _type_hint(cls, name, strict=False)):
        written = (inspect.get_annotations(base).get(name) for base in cls.__mro__)
        wanted = next(hint for hint in written if hint is not None)
        got = f"a {type(value).__qualname__}" if isinstance(value, Config) else repr(value)
        raise ConfigError(f"{cls.__qualname__}.{name} must be {wanted}, got {got}")
    limit = COUNT_LIMIT if name.startswith("num_") else SIZE_LIMIT
    for count in value if isinstance(value, tuple | list) else (value,):
        if isinstance(count, int) and abs(count) > limit:
            raise ConfigError(f"{cls.__qualname__}.{name} {count:,} is beyond any model; at most {limit:,} is taken")
        if isinstance(count, float) and math.isnan(count):
            raise ConfigError(
                f"{cls.__qualname__}.{name} is {count}, which would make every answer none; give a number"
            )
        # a model with any of these runs, and what it says means nothing
        if isinstance(count, int | float) and _ADDED_BY_NORMS.fullmatch(name) and not 0 <= count < math.inf:
            raise ConfigError(f"{cls.__qualname__}.{name} must be a number from 0, got {count}")
        if isinstance(count, int | float) and _BASES_OF_ANGLES.fullmatch(name) and not 0 < count < math.inf:
            raise ConfigError(f"{cls.__qualname__}.{name} must be a positive number, got {count}")


def _fits(value: Any, hint: Any) -> bool:
    """Whether a value is what an annotation says; annotations that nothing is known of let everything pass."""
    options = _options(hint)
    if len(options) > 1:
        return any(_fits(value, option) for option in options)
    if hint is None or hint is type(None):
        return value is None
    if hint in (bool, str):
        return isinstance(value, hint)
    if hint in (int, float):
        kind = numbers.Integral if hint is int else numbers.Real
        return isinstance(value, kind) and not isinstance(value, bool)
    if isinstance(hint, type) and issubclass(hint, Config):
        # a part may write its config from scratch; what it builds decides then
        made, wanted = getattr(value, "target", None), getattr(hint, "target", None)
        builds_it = isinstance(made, type) and isinstance(wanted, type) and issubclass(made, wanted)
        return isinstance(value, hint) or (isinstance(value, Config) and builds_it)
    if typing.get_origin(hint) in (tuple, list):
        items = [item for item in typing.get_args(hint) if item is not ...]
        if not isinstance(value, tuple | list):
            return False
        return len(items) != 1 or all(_fits(item, items[0]) for item in value)
    if typing.get_origin(hint) is dict:
        return isinstance(value, dict) and all(_fits(item, typing.get_args(hint)[1]) for item in value.values())
    return True


def _is_required(field: dataclasses.Field[Any]) -> bool:
    return field.init and field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


def _to_plain(value: Any, where: str) -> Any:
    if isinstance(value, Config):
        return value.to_dict()
    if isinstance(value, tuple | list):
        return [_to_plain(item, where) for item in value]
    if isinstance(value, dict) and all(isinstance(key, str) for key in value):
        return {key: _to_plain(item, f"{where}[{key!r}]") for key, item in value.items()}
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise ConfigError(f"{where} holds {value!r}; a config holds plain values, mappings by name and other configs only")


def _from_plain(value: Any, hint: Any) -> Any:
    options = _options(hint)
    if isinstance(value, dict):
        config = next((option for option in options if isinstance(option, type) and issubclass(option, Config)), None)
        if config is not None:
            return config.from_dict(value)
        types_ = _arguments(options, collections.abc.Mapping)
        return {key: _from_plain(item, types_[1] if types_ else Any) for key, item in value.items()}
    if isinstance(value, list | tuple):
        items = _arguments(options, collections.abc.Sequence)
        if len(items) == 1 or items[1:] == (...,):
            items = items[:1] * len(value)
        elif len(items) != len(value):
            items = (Any,) * len(value)
        return tuple(_from_plain(item, kind) for item, kind in zip(value, items, strict=True))
    return value


def _arguments(options: tuple[Any, ...], kind: type) -> tuple[Any, ...]:
    """What stands in the brackets of the first option that is a ``kind``: ``(int, ...)`` of ``tuple[int, ...]``."""
    for option in options:
        origin = typing.get_origin(option)
        if isinstance(origin, type) and issubclass(origin, kind):
            return typing.get_args(option)
    return ()


def _options(hint: Any) -> tuple[Any, ...]:
    return typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)


def _type_hint(cls: type, field: str, *, strict: bool = True) -> Any:
    """The annotation of a field, read in the module that wrote it: in the class itself, values hide names."""
    for base in cls.__mro__:
        hint = inspect.get_annotations(base).get(field)
        if hint is None:
            continue
        if not isinstance(hint, str):
            return hint
        try:
            return eval(hint, dict(vars(sys.modules[base.__module__])))  # noqa: S307 - our own annotations
        except NameError as error:
            if not strict:
                return Any
            where = f"{base.__qualname__}.{field}"
            raise ConfigError(f"{where} is annotated {hint!r}: {error}; import it in {base.__module__}") from None
    raise AssertionError(f"{cls.__qualname__} has a field {field!r} without an annotation")

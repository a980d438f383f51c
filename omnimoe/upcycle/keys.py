"""Parts written over the keys of the seed, for a model that has more keys or others."""

from __future__ import annotations

import functools
from dataclasses import fields
from typing import Any

from omnimoe.config import Config
from omnimoe.experts import RoutedExperts
from omnimoe.layers import TowerMap, num_copies, resolve_towers
from omnimoe.routers import ByModalityRouter, StaticRouter
from omnimoe.towers.cutting import annotation


@functools.singledispatch
def extend_keys(part: Any, *, origin: tuple[int, ...], num_keys: int) -> Any:
    """The config of a part for a model with other keys, each of which starts as one of the seed's.

    A map that gives every key of the seed its own copy gives new keys copies of their own; in any other a new key
    shares the copy of the one it starts as. Where a part of yours has other fields over keys, register what becomes of
    them: ``@extend_keys.register(MyExperts.Config)``.

    Args:
        part: config of any part.
        origin: of each key, the key of the seed that it starts as.
        num_keys: keys of the seed.
    """
    if isinstance(part, tuple | list):
        return tuple(extend_keys(held, origin=origin, num_keys=num_keys) for held in part)
    if not isinstance(part, Config):
        return part
    changes: dict[str, Any] = {}
    for field in fields(part):
        value, hint = getattr(part, field.name), annotation(type(part), field.name)
        if hint == "TowerMap":
            changes[field.name] = extend_map(value, origin, num_keys)
        elif hint == "dict[str, TowerMap]":
            changes[field.name] = {site: extend_map(towers, origin, num_keys) for site, towers in value.items()}
        elif isinstance(value, Config | tuple | list):
            changes[field.name] = extend_keys(value, origin=origin, num_keys=num_keys)
    return part.replace(**changes)


@extend_keys.register
def _(part: RoutedExperts.Config, *, origin: tuple[int, ...], num_keys: int) -> Any:
    router = extend_keys(part.router, origin=origin, num_keys=num_keys)
    count = part.num_experts
    if isinstance(router, ByModalityRouter.Config):
        count = sum(router.experts)
    elif isinstance(router, StaticRouter.Config) and not router.experts_of_keys:
        count = len(origin)
    return part.replace(router=router, num_experts=count)


@extend_keys.register
def _(part: ByModalityRouter.Config, *, origin: tuple[int, ...], num_keys: int) -> Any:
    inner = extend_keys(part.router, origin=origin, num_keys=num_keys)
    return part.replace(experts=tuple(part.experts[key] for key in origin), router=inner)


@extend_keys.register
def _(part: StaticRouter.Config, *, origin: tuple[int, ...], num_keys: int) -> Any:
    sets = part.experts_of_keys
    return part.replace(experts_of_keys=tuple(sets[key] for key in origin) if sets else ())


def extend_map(towers: TowerMap, origin: tuple[int, ...], num_keys: int) -> TowerMap:
    """A tower map over the new keys."""
    copies = resolve_towers(towers, num_keys)
    if num_copies(copies) == 1 and num_keys > 1:
        return "shared"
    if towers in ("shared", "modality"):
        return towers
    if copies == tuple(range(num_keys)):
        return "modality"
    return tuple(copies[key] for key in origin)

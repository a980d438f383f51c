"""Configs of parts, for a model that has some of its keys alone."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import fields
from typing import Any

from omnimoe.config import Config
from omnimoe.experts import RoutedExperts, RoutedProjections
from omnimoe.layers import TowerMap, resolve_towers
from omnimoe.layers.reader_attention import ReaderAttention
from omnimoe.routers import AttributeRouter, ByModalityRouter, SoftRouter, StaticRouter
from omnimoe.routers.balance import BalancedRouter


@functools.singledispatch
def keep_keys(part: Any, *, keys: tuple[int, ...], num_keys: int) -> Any:
    """The config of a part for a model that has some of its keys alone.

    Fields that are annotated as tower maps are cut, in configs inside of it too. Where a part of yours has other fields
    over keys, register what becomes of them: ``@keep_keys.register(MyExperts.Config)``.

    Args:
        part: config of any part.
        keys: ids of the keys that stay, ascending.
        num_keys: keys of the whole model.
    """
    inside = functools.partial(keep_keys, keys=keys, num_keys=num_keys)
    return change_maps(part, lambda towers: _cut_map(towers, keys, num_keys), inside)


@keep_keys.register
def _(part: RoutedExperts.Config, *, keys: tuple[int, ...], num_keys: int) -> Any:
    cut = keep_keys.dispatch(Config)(part, keys=keys, num_keys=num_keys)
    kept = {expert for key in keys for expert in part.router.reached_experts(part.num_experts, key)}
    pools, first = [], 0
    for count, width in part.pools:
        stay = len(kept & set(range(first, first + count)))
        pools += [(stay, width)] if stay else []
        first += count
    return cut.replace(num_experts=len(kept), pools=tuple(pools))


@keep_keys.register
def _(part: RoutedProjections.Config, *, keys: tuple[int, ...], num_keys: int) -> Any:
    cut = keep_keys.dispatch(Config)(part, keys=keys, num_keys=num_keys)
    kept = {expert for key in keys for expert in part.router.reached_experts(part.num_experts, key)}
    return cut.replace(num_experts=len(kept))


@keep_keys.register
def _(part: SoftRouter.Config, *, keys: tuple[int, ...], num_keys: int) -> Any:
    return part.replace(experts=tuple(part.experts[key] for key in keys) if part.experts else ())


@keep_keys.register
def _(part: ByModalityRouter.Config, *, keys: tuple[int, ...], num_keys: int) -> Any:
    inner = keep_keys(part.router, keys=keys, num_keys=num_keys)
    return part.replace(experts=tuple(part.experts[key] for key in keys), router=inner)


@keep_keys.register
def _(part: StaticRouter.Config, *, keys: tuple[int, ...], num_keys: int) -> Any:
    kept = experts_of(part, keys)
    sets = (part.experts_of_keys[key] if part.experts_of_keys else key for key in keys)
    return part.replace(
        experts_of_keys=tuple(
            kept.index(chosen) if isinstance(chosen, int) else tuple(kept.index(expert) for expert in chosen)
            for chosen in sets
        )
    )


@keep_keys.register
def _(part: ReaderAttention.Config, *, keys: tuple[int, ...], num_keys: int) -> Any:
    cut = keep_keys.dispatch(Config)(part, keys=keys, num_keys=num_keys)
    return cut.replace(readers=tuple(part.readers[key] for key in keys))


@keep_keys.register
def _(part: BalancedRouter.Config, *, keys: tuple[int, ...], num_keys: int) -> Any:
    return part.replace(entropy_keys=tuple(new for new, key in enumerate(keys) if key in part.entropy_keys))


@keep_keys.register
def _(part: AttributeRouter.Config, *, keys: tuple[int, ...], num_keys: int) -> Any:
    own = tuple(tuple(int(one == other) for other in range(num_keys)) for one in range(num_keys))
    codes = part.attributes_of_keys or own
    cut = keep_keys.dispatch(BalancedRouter.Config)(part, keys=keys, num_keys=num_keys)
    return cut.replace(attributes_of_keys=tuple(codes[key] for key in keys))


def experts_of(router: StaticRouter.Config, keys: tuple[int, ...]) -> tuple[int, ...]:
    """The experts that rows of some keys meet, ascending."""
    found: set[int] = set()
    for key in keys:
        chosen = router.experts_of_keys[key] if router.experts_of_keys else key
        found |= {chosen} if isinstance(chosen, int) else set(chosen)
    return tuple(sorted(found))


def change_maps(part: Any, change: Callable[[TowerMap], TowerMap], inside: Callable[[Any], Any]) -> Any:
    """A config whose tower maps, the fields that are annotated as such, are others.

    Args:
        part: the config, or several in a tuple or list; anything else stays as it is.
        change: what becomes of a tower map.
        inside: what becomes of the configs inside of it.
    """
    if isinstance(part, tuple | list):
        return tuple(inside(held) for held in part)
    if not isinstance(part, Config):
        return part
    changes: dict[str, Any] = {}
    for field in fields(part):
        value, hint = getattr(part, field.name), _annotation(type(part), field.name)
        if hint == "TowerMap":
            changes[field.name] = change(value)
        elif hint == "dict[str, TowerMap]":
            changes[field.name] = {site: change(towers) for site, towers in value.items()}
        elif isinstance(value, Config | tuple | list):
            changes[field.name] = inside(value)
    return part.replace(**changes)


def _annotation(cls: type, name: str) -> Any:
    """How a field is annotated, ``"TowerMap"`` for tower maps."""
    hints = (inspect.get_annotations(base).get(name) for base in cls.__mro__)
    hint = next((found for found in hints if found is not None), None)
    return "TowerMap" if hint == TowerMap else hint


def _cut_map(towers: TowerMap, keys: tuple[int, ...], num_keys: int) -> TowerMap:
    copies = resolve_towers(towers, num_keys)
    chosen = [copies[key] for key in keys]
    order = sorted(set(chosen))
    if len(order) == 1:
        return "shared"
    cut = tuple(order.index(copy) for copy in chosen)
    return "modality" if cut == tuple(range(len(keys))) else cut

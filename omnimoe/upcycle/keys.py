"""Parts written over the keys of the seed, for a model that has more keys or others."""

from __future__ import annotations

import functools
from typing import Any

from omnimoe.config import Config
from omnimoe.experts import RoutedExperts, RoutedProjections
from omnimoe.layers import TowerMap, num_copies, resolve_towers
from omnimoe.layers.reader_attention import ReaderAttention
from omnimoe.routers import AttributeRouter, ByModalityRouter, SoftRouter, StaticRouter
from omnimoe.routers.balance import BalancedRouter
from omnimoe.towers.cutting import change_maps


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
    inside = functools.partial(extend_keys, origin=origin, num_keys=num_keys)
    return change_maps(part, lambda towers: extend_map(towers, origin, num_keys), inside)


@extend_keys.register(RoutedExperts.Config)
@extend_keys.register(RoutedProjections.Config)
def _(part: Any, *, origin: tuple[int, ...], num_keys: int) -> Any:
    made = extend_keys.dispatch(Config)(part, origin=origin, num_keys=num_keys)
    router, count = made.router, part.num_experts
    if isinstance(router, ByModalityRouter.Config | SoftRouter.Config) and router.experts:
        count = sum(router.experts)
    elif isinstance(router, StaticRouter.Config) and not router.experts_of_keys:
        count = len(origin)
    return made.replace(num_experts=count)


@extend_keys.register
def _(part: ByModalityRouter.Config, *, origin: tuple[int, ...], num_keys: int) -> Any:
    inner = extend_keys(part.router, origin=origin, num_keys=num_keys)
    return part.replace(experts=tuple(part.experts[key] for key in origin), router=inner)


@extend_keys.register
def _(part: SoftRouter.Config, *, origin: tuple[int, ...], num_keys: int) -> Any:
    return part.replace(experts=tuple(part.experts[key] for key in origin) if part.experts else ())


@extend_keys.register
def _(part: StaticRouter.Config, *, origin: tuple[int, ...], num_keys: int) -> Any:
    sets = part.experts_of_keys
    return part.replace(experts_of_keys=tuple(sets[key] for key in origin) if sets else ())


@extend_keys.register
def _(part: ReaderAttention.Config, *, origin: tuple[int, ...], num_keys: int) -> Any:
    made = extend_keys.dispatch(Config)(part, origin=origin, num_keys=num_keys)
    return made.replace(readers=tuple(part.readers[key] for key in origin))


@extend_keys.register
def _(part: BalancedRouter.Config, *, origin: tuple[int, ...], num_keys: int) -> Any:
    return part.replace(entropy_keys=tuple(new for new, key in enumerate(origin) if key in part.entropy_keys))


@extend_keys.register
def _(part: AttributeRouter.Config, *, origin: tuple[int, ...], num_keys: int) -> Any:
    made = extend_keys.dispatch(BalancedRouter.Config)(part, origin=origin, num_keys=num_keys)
    codes = part.attributes_of_keys
    return made.replace(attributes_of_keys=tuple(codes[key] for key in origin) if codes else ())


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

"""Where feed-forward networks and experts start, and the routers above them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from itertools import accumulate, pairwise
from typing import Any

from torch import nn

from omnimoe.config import ConfigError
from omnimoe.experts import FeedForward, RoutedExperts, RoutedProjections
from omnimoe.routers import ByModalityRouter, Router, SoftRouter, StaticRouter
from omnimoe.upcycle.gates import (
    CHANGED,
    EXACT,
    REMIXED,
    RESCALED,
    SAME_ROUTES,
    UNGATED,
    UNROUTED,
    Gate,
    RoutedConfig,
    copied_gate,
    fresh_gate,
)
from omnimoe.upcycle.sources import Change, Choices, Plan, Start, copies_of, start_of

Routed = RoutedExperts | RoutedProjections

_NEAR = 0.05
"""Of a new router's usual spread, where sums of its weights are estimated."""


@start_of.register
def _(new: FeedForward, old: nn.Module, choices: Choices) -> Plan:
    if not isinstance(old, FeedForward):
        raise ConfigError("experts of the seed do not become one network again; keep them, or add more")
    index = copies_of(new.towers, old.towers, choices.origin)
    return Plan({f"experts.{name}": Start(f"experts.{name}", index) for name, _ in new.experts.named_parameters()})


@start_of.register
def _(new: RoutedExperts, old: nn.Module, choices: Choices) -> Plan:
    if not isinstance(old, FeedForward | RoutedExperts):
        raise ConfigError(f"experts cannot be started from {type(old).__qualname__}")
    plan = Plan()
    index: list[int] = []
    scale: list[float] = []
    outcomes: dict[str, str] = {}
    for held in pools_of(new, old, choices.origin):
        index += held.index
        gate = held.gate(new, old, choices)
        function, factor = gate.outcome(choices.placement)
        scale += [factor if choices.rescale else 1.0] * len(held.index)
        plan.starts |= dict(held.router_starts(choices))
        plan.fresh |= held.fresh
        if held.old is not None and held.fresh:
            function, gate = CHANGED, replace(gate, why=f"of the router, {', '.join(sorted(held.fresh))} is new")
        elif factor != 1 and not choices.rescale:
            function = CHANGED
        elif factor != 1 and not gate.is_even:
            # the mean of the sum is that of a router whose scores lie near their middle
            plan.factors |= {name: _NEAR for name in held.fresh if name.endswith("scorer.weight")}
        outcomes.setdefault(function, gate.why)
    noise = choices.expert_noise
    for name, _ in new.experts.named_parameters():
        is_last = name.startswith("down_")
        start = Start(f"experts.{name}", tuple(index), scale=tuple(scale) if is_last else (), noise=noise)
        plan.starts[f"experts.{name}"] = start
    if noise and len(set(index)) < len(index):
        outcomes[CHANGED] = f"copies are moved apart by {noise:g} of their spread"
    if getattr(old, "shared_experts", None) is None and new.shared_experts is not None:
        plan.factors["shared_experts.down_proj"] = 0.0  # beside the copies it adds nothing at first
    if isinstance(old, RoutedExperts) and not stand_alike(new.config, old.config):
        outcomes[CHANGED] = BESIDE
    worst = next(name for name in (CHANGED, RESCALED, EXACT) if name in outcomes)
    plan.changes.append(Change(where="", function=worst, why=outcomes[worst]))
    return plan


@dataclass
class Pool:
    """A group of experts and its router.

    Args:
        index: the seed's expert that each starts as.
        pool: the seed's experts that these rows chose among.
        router: of the group; None where there is none.
        old: the router of the pool in the seed; None where there was none.
        path: of the router inside of the experts.
        old_path: of the seed's.
        is_split: the seed's router met rows of other pools too.
        was_mixed: rows of a key met several experts of the seed at once, by static routes.
        keeps_routes: rows of each key meet as many experts as those of its origin did, in the same way.
    """

    index: list[int]
    pool: tuple[int, ...]
    router: Router | None
    old: Router | None
    path: str
    old_path: str
    is_split: bool = False
    was_mixed: bool = False
    keeps_routes: bool = False
    fresh: set[str] = field(default_factory=set)

    def gate(self, new: Routed, old: nn.Module, choices: Choices) -> Gate:
        """The weights of a row's copies in the new model."""
        if self.router is None:
            return UNROUTED if self.old is None else UNGATED
        config = _config_of(new)
        if self.keeps_routes:
            return SAME_ROUTES
        if self.was_mixed:
            return REMIXED
        if not isinstance(old, Routed) or self.old is None:
            return fresh_gate(config, len(self.index), declared(new))
        counts = {self.index.count(expert) for expert in self.pool}
        times = counts.pop() if len(counts) == 1 else 0
        noise = choices.router_noise if times > 1 else 0.0
        return copied_gate(config, _config_of(old), times, declared(new), noise, is_split=self.is_split)

    def router_starts(self, choices: Choices) -> Iterator[tuple[str, Start]]:
        """Rows of a router for copies of an expert are those of the expert; the rest of it stays."""
        if self.router is None:
            return
        held = {} if self.old is None else self.old.state_dict()
        places = [self.pool.index(expert) for expert in self.index]
        for name, tensor in self.router.state_dict().items():
            if name not in held:
                self.fresh.add(f"{self.path}{name}")
                continue
            source = held[name]
            axis = 1 if name == "expert_bias" and source.ndim == 2 else 0
            extra = (source.shape[axis] if source.ndim else 0) - len(self.pool)
            index = tuple(places + [len(self.pool) + i for i in range(max(0, extra))])
            start = Start(f"{self.old_path}{name}", index, axis, noise=choices.router_noise if axis == 0 else 0.0)
            if source.ndim and extra >= 0 and start.shape(source) == tuple(tensor.shape):
                is_row = name.endswith("weight") and len(set(places)) < len(places)
                yield f"{self.path}{name}", start if is_row else replace(start, noise=0.0)
            elif source.shape == tensor.shape:
                yield f"{self.path}{name}", Start(f"{self.old_path}{name}")
            else:
                self.fresh.add(f"{self.path}{name}")


def pools_of(new: Routed, old: Any, origin: tuple[int, ...]) -> Iterator[Pool]:
    """The groups of experts that rows choose among, and where each starts.

    Args:
        new: of the new model.
        old: experts of the seed, or what has copies by key there.
        origin: of each key, the key of the seed that it starts as.

    Raises:
        ConfigError: if networks of the seed that differ would become one.
    """
    router = new.router
    if isinstance(router, SoftRouter) and router.config.experts:
        # one router whose experts lie key by key
        counts, groups = router.config.experts, [_pool_of(old, source) for source in origin]
        spread = [expert for count, group in zip(counts, groups, strict=True) for expert in _spread(count, group)]
        seed = getattr(old, "router", None)
        if not isinstance(seed, SoftRouter):
            mixed = any(_mixes(old, group) for group in groups)
            yield Pool(spread, tuple(sorted(set(spread))), router, None, "router.", "", was_mixed=mixed)
            return
        keeps = bool(seed.config.experts) and seed.config.num_slots == router.config.num_slots
        keeps = keeps and all(count == len(group) for count, group in zip(counts, groups, strict=True))
        yield Pool(spread, tuple(range(old.num_experts)), router, seed, "router.", "router.", keeps_routes=keeps)
        return
    if isinstance(router, ByModalityRouter):
        is_split = len(set(origin)) > 1 and not isinstance(getattr(old, "router", None), ByModalityRouter)
        for key, count in enumerate(router.config.experts):
            inner, path = _router_at(old, origin[key])
            pool = _pool_of(old, origin[key])
            own = router.routers[key]
            mixed = _mixes(old, pool)
            yield Pool(_spread(count, pool), pool, own, inner, f"router.routers.{key}.", path, is_split, mixed)
        return
    if isinstance(router, StaticRouter):
        index = [-1] * new.num_experts
        held: Any = _config_of(old) if isinstance(old, Routed) else None
        asked: Any = _config_of(new)
        was_static, was_mixed = isinstance(held, StaticRouter.Config), False
        keeps = was_static and held.combine == asked.combine
        for key, chosen in enumerate(router.experts_of_keys):
            pool = _pool_of(old, origin[key])
            own_set = [expert for expert in chosen if expert >= 0]
            if len(own_set) < len(pool):
                raise ConfigError(f"static routes give key {key} {len(own_set)} experts, the seed has {len(pool)}")
            was_mixed |= was_static and len(pool) > 1
            even = asked.combine == "mean" and not len(own_set) % len(pool)
            keeps = keeps and (len(own_set) == len(pool) or even)
            for expert, source in zip(own_set, _spread(len(own_set), pool), strict=True):
                if index[expert] not in (-1, source):
                    raise ConfigError(
                        f"expert {expert} would start as two different ones; give their keys experts apart"
                    )
                index[expert] = source
        found = [max(0, source) for source in index]
        yield Pool(found, tuple(set(index)), router, None, "router.", "", was_mixed=was_mixed, keeps_routes=keeps)
        return
    pools = {_pool_of(old, key) for key in set(origin)}
    if len(pools) > 1:
        raise ConfigError(
            "one pool of experts would merge networks of the seed that differ by key; give each key its own, "
            "experts={'text': 4, 'image': 4}"
        )
    inner, path = _router_at(old, origin[0])
    pool = pools.pop()
    yield Pool(_spread(new.num_experts, pool), pool, router, inner, "router.", path, was_mixed=_mixes(old, pool))


def _mixes(old: Any, pool: tuple[int, ...]) -> bool:
    """Whether static routes of the seed gave a row several experts at once."""
    return isinstance(getattr(old, "router", None), StaticRouter) and len(pool) > 1


def _pool_of(old: Any, key: int) -> tuple[int, ...]:
    """The seed's experts that rows of a key choose among."""
    if not isinstance(old, Routed):
        return (old.towers[key],)
    if isinstance(old.router, ByModalityRouter | SoftRouter) and old.router.config.experts:
        start, stop = list(pairwise(accumulate(old.router.config.experts, initial=0)))[key]
        return tuple(range(start, stop))
    if isinstance(old.router, StaticRouter):
        return tuple(expert for expert in old.router.experts_of_keys[key] if expert >= 0)
    return tuple(range(old.num_experts))


def _router_at(old: Any, key: int) -> tuple[Any, str]:
    """The router that rows of a key met in the seed, and its path."""
    if not isinstance(old, Routed) or isinstance(old.router, StaticRouter):
        return None, ""
    if isinstance(old.router, ByModalityRouter):
        return old.router.routers[key], f"router.routers.{key}."
    return old.router, "router."


BESIDE = "what stands beside the experts, or what their weights multiply, is other than in the seed"


def stand_alike(new: RoutedConfig, old: RoutedConfig) -> bool:
    """Whether the same stands beside experts that were routed before; shared ones that are new add nothing."""
    names = ("free_experts", "weights_on")
    if any(getattr(new, name, None) != getattr(old, name, None) for name in names):
        return False
    if not old.num_shared_experts:
        return new.shared_gate != "softmax"
    return (new.num_shared_experts, new.shared_gate) == (old.num_shared_experts, old.shared_gate)


def declared(experts: Routed) -> RoutedConfig:
    """The config of experts."""
    return experts.declared if isinstance(experts, RoutedProjections) else experts.config


def _config_of(experts: Routed) -> Router.Config:
    """The config of the router inside of a group."""
    router = declared(experts).router
    return router.router if isinstance(router, ByModalityRouter.Config) else router


def _spread(count: int, pool: tuple[int, ...]) -> list[int]:
    """Copies of a pool, those of one expert side by side."""
    if count < len(pool):
        raise ConfigError(
            f"{count} experts are fewer than the {len(pool)} of the seed; upcycling adds, it takes none away"
        )
    return [pool[place * len(pool) // count] for place in range(count)]

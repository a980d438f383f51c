"""The config of the new model, from the seed's and from what is asked for."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from omnimoe.backbone import LayerRange
from omnimoe.config import ConfigError
from omnimoe.experts import Experts, FeedForward, RoutedExperts
from omnimoe.layers import TowerMap, resolve_towers
from omnimoe.model import OmniMoeConfig
from omnimoe.routers import ByModalityRouter, ExpertChoiceRouter, Router, SoftRouter, TopKRouter
from omnimoe.upcycle.keys import extend_keys
from omnimoe.upcycle.vocabulary import Vocabulary

WHOLE_SITES = ("attention", "experts", "norm", "final_norm")
ATTENTION_SITES = ("q_proj", "k_proj", "v_proj", "o_proj", "qk_norm")

Towers = TowerMap | Mapping[str, TowerMap] | None
ExpertsAsked = int | Mapping[str, int] | Experts.Config | None


def origin_of(
    seed: OmniMoeConfig, vocabulary: Vocabulary, keys: tuple[str, ...], start_from: Mapping[str, str]
) -> tuple[int, ...]:
    """Of each key of the new model, the key of the seed that its copies start as.

    Raises:
        ConfigError: if ``start_from`` names what is not there, or new keys would part what the seed's keys hold.
    """
    old = seed.keys or seed.modality_names
    new = keys or seed.keys or tuple(part.name for part in vocabulary.modalities)
    if keys and seed.needs_key_order and set(old) - set(keys):
        raise ConfigError(f"the seed has copies by {', '.join(old)}; new keys must hold them all, got {keys}")
    for name, source in start_from.items():
        if name not in new or source not in old or name in old:
            raise ConfigError(
                f"start_from says that {name!r} starts as {source!r}; new keys are "
                f"{', '.join(key for key in new if key not in old) or 'none'}, and those of the seed {', '.join(old)}"
            )
    return tuple(old.index(key) if key in old else old.index(start_from.get(key, old[0])) for key in new)


def target_config(
    seed: OmniMoeConfig,
    vocabulary: Vocabulary,
    origin: tuple[int, ...],
    *,
    keys: tuple[str, ...] = (),
    towers: Towers = None,
    experts: ExpertsAsked = None,
    router: Router.Config | None = None,
    layers: Iterable[LayerRange] = (),
    tie: bool | None = None,
    changes: Mapping[str, Any] | None = None,
) -> OmniMoeConfig:
    """The config of the new model; arguments are those of :func:`omnimoe.upcycle`.

    Raises:
        ConfigError: if they do not fit the seed or each other.
    """
    uneven = [block.experts for block in seed.blocks]
    if seed.widths or any(getattr(part, "intermediate_sizes", ()) or getattr(part, "pools", ()) for part in uneven):
        raise ConfigError("towers or experts of the seed differ in width, and such a seed is not upcycled")
    names = keys or seed.keys or tuple(part.name for part in vocabulary.modalities)
    maps = _read_towers(towers, len(names))
    if router is not None and experts is None:
        raise ConfigError("a router is for new experts; say how many, experts=8 or experts={'text': 4, 'image': 4}")
    routed = any(isinstance(block.experts, RoutedExperts.Config) for block in seed.blocks)

    def over_new_keys(part: Any) -> Any:
        return extend_keys(part, origin=origin, num_keys=seed.num_keys)

    def attention(part: Any) -> Any:
        return None if part is None else _with_maps(over_new_keys(part), maps)

    def norm(part: Any, site: str = "norm") -> Any:
        if part is None:
            return None
        extended = over_new_keys(part)
        return extended.replace(towers=maps[site]) if site in maps else extended

    def work(part: Any) -> Any:
        if part is None:
            return None
        extended = over_new_keys(part)
        if experts is not None and (isinstance(part, RoutedExperts.Config) or not routed):
            return _with_experts(extended, experts, router, names)
        return extended if "experts" not in maps else _with_experts_by_key(extended, maps["experts"], names)

    values = {
        "modalities": vocabulary.modalities,
        "vocab_size": len(vocabulary.rows),
        "attention": attention(seed.attention),
        "experts": work(seed.experts),
        "norm": norm(seed.norm),
        "mlp_norm": norm(seed.mlp_norm),
        "final_norm": norm(seed.final_norm, "final_norm"),
        "layers": (*(_changed(held, attention, work, norm) for held in seed.layers), *layers),
        **vocabulary.special,
        **({} if tie is None else {"tie_word_embeddings": tie}),
        **({"keys": keys} if keys else {}),
    }
    given = dict(changes or {})
    for name in given:
        if name in (*values, "num_layers", "num_hidden_layers"):
            raise ConfigError(f"{name} of the new model follows from the other arguments; leave it out")
    config = seed.replace(**{**values, **given})
    config.dtype = seed.dtype
    config._attn_implementation = seed._attn_implementation
    if seed.card is not None:
        config.card = dict(seed.card)
    return config


def _read_towers(towers: Towers, num_keys: int) -> dict[str, TowerMap]:
    if towers is None:
        return {}
    maps = dict(towers) if isinstance(towers, Mapping) else dict.fromkeys(WHOLE_SITES, towers)
    known = (*WHOLE_SITES, *ATTENTION_SITES)
    for site, held in maps.items():
        if site not in known:
            raise ConfigError(f"towers names site {site!r}; the sites are {', '.join(known)}")
        resolve_towers(held, num_keys)
    return maps


def _with_maps(part: Any, maps: Mapping[str, TowerMap]) -> Any:
    single = {site: held for site, held in maps.items() if site in ATTENTION_SITES}
    fields = {field.name for field in dataclasses.fields(part)}
    if ("attention" in maps and "towers" not in fields) or (single and "site_towers" not in fields):
        raise ConfigError(f"{type(part).__qualname__} has no towers of that kind: {', '.join(maps)}")
    if "attention" in maps:
        part = part.replace(towers=maps["attention"], **({"site_towers": {}} if "site_towers" in fields else {}))
    return part.replace(site_towers={**part.site_towers, **single}) if single else part


def _with_experts(part: Any, asked: ExpertsAsked, router: Router.Config | None, names: tuple[str, ...]) -> Any:
    """The networks of a layer as experts."""
    if isinstance(asked, Experts.Config):
        if router is not None:
            raise ConfigError("experts is a whole config and holds a router; leave router out")
        return asked
    if not isinstance(asked, int | Mapping) or isinstance(asked, bool):
        raise ConfigError(f"experts is a number, numbers by key or a config of experts, got {asked!r}")
    if not isinstance(part, FeedForward.Config | RoutedExperts.Config):
        raise ConfigError(f"experts cannot be started from {type(part).__qualname__}; pass a config of experts")
    if isinstance(asked, Mapping):
        unknown = [name for name in asked if name not in names]
        missing = [name for name in names if name not in asked]
        if unknown or missing:
            told = f"unknown {unknown[0]!r}" if unknown else f"{missing[0]!r} has no number"
            raise ConfigError(f"experts gives each of {', '.join(names)} a number of experts: {told}")
        counts = tuple(asked[name] for name in names)
    else:
        counts = (asked,)
    if any(not isinstance(count, int) or count < 1 for count in counts):
        raise ConfigError(f"experts are at least one, got {asked!r}")
    held = getattr(part, "router", None)
    pools = _pools(part, len(names))
    if router is None:
        router = _router_of(held, counts, pools)
    if isinstance(asked, Mapping) and not isinstance(router, ByModalityRouter.Config):
        groups = held if isinstance(held, ByModalityRouter.Config) else ByModalityRouter.Config()
        router = groups.replace(experts=counts, router=router)
    if isinstance(part, FeedForward.Config):
        return RoutedExperts.Config(
            num_experts=sum(counts),
            intermediate_size=part.intermediate_size,
            activation=part.activation,
            gated=part.gated,
            router=router,
        )
    return part.replace(num_experts=sum(counts), router=router)


def _with_experts_by_key(part: Any, towers: TowerMap, names: tuple[str, ...]) -> Any:
    """A tower map over networks; experts under a router become a group of them for each key, router and all."""
    if hasattr(part, "towers"):
        return part.replace(towers=towers)
    copies = resolve_towers(towers, len(names))
    if not isinstance(part, RoutedExperts.Config):
        raise ConfigError(f"{type(part).__qualname__} has no towers; leave 'experts' out of towers")
    if isinstance(part.router, ByModalityRouter.Config) or copies == (0,) * len(names):
        return part
    if copies != tuple(range(len(names))):
        raise ConfigError(
            f"experts under a router are kept apart key by key, and the tower map {copies} merges some; write "
            "'modality' or 'shared' for the site 'experts'"
        )
    return _with_experts(part, dict.fromkeys(names, part.num_experts), None, names)


def _pools(part: Any, num_keys: int) -> tuple[int, ...]:
    """How many experts rows of each key choose among."""
    if isinstance(part, FeedForward.Config):
        return (1,) * num_keys
    if isinstance(part.router, ByModalityRouter.Config):
        return part.router.experts
    return (part.num_experts,) * num_keys


def _router_of(held: Router.Config | None, counts: tuple[int, ...], pools: tuple[int, ...]) -> Router.Config:
    """The router where none is given: the seed's, taking as many copies of an expert as there are."""
    inner = held.router if isinstance(held, ByModalityRouter.Config) else held
    if inner is None:
        return TopKRouter.Config(top_k=min(2, max(counts)))
    if isinstance(held, ByModalityRouter.Config) and max(pools) == 1 and not held.gate_lone_expert:
        return inner  # declared, and asked for the first time
    times = {count // pool for count, pool in zip(counts, pools, strict=False) if not count % pool}
    if len(times) != 1 or any(count % pool for count, pool in zip(counts, pools, strict=False)):
        return inner
    return multiplied(inner, times.pop())


def multiplied(router: Router.Config, times: int) -> Router.Config:
    """A router over ``times`` copies of each expert that lets a row meet them all, so that it gets what it got."""
    if times == 1:
        return router
    if isinstance(router, TopKRouter.Config):
        # scores that sum to one are shared out among copies, others count once for each
        is_shared = router.score == "softmax" or (router.normalize and router.top_k > 1)
        return router.replace(
            top_k=times * router.top_k,
            normalize=router.normalize and router.top_k > 1,
            routed_scaling_factor=router.routed_scaling_factor / (1 if is_shared else times),
        )
    if isinstance(router, ExpertChoiceRouter.Config):
        return router.replace(capacity_factor=times * router.capacity_factor)
    if isinstance(router, SoftRouter.Config):
        return router.replace(experts=tuple(times * count for count in router.experts))
    return router


def _changed(
    held: LayerRange, attention: Callable[[Any], Any], work: Callable[[Any], Any], norm: Callable[[Any], Any]
) -> LayerRange:
    norms = {"norm": norm(held.norm), "mlp_norm": norm(held.mlp_norm)}
    return held.replace(attention=attention(held.attention), experts=work(held.experts), **norms)

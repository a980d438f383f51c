"""Experts inside of attention: a router above the banks of its projections, one choice for all of them."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from omnimoe.config import ConfigError
from omnimoe.experts.sent import Mixed, Sent
from omnimoe.layers import Attention, AttentionMask, ExpertLinear, RowLayout, register_attention
from omnimoe.routers import Router, Routing, TopKRouter

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")
HEAD_SITES = ("q_proj", "o_proj")
"""What experts with heads of their own have copies of."""


@register_attention("routed_attention")
class RoutedAttention(Attention):
    """Grouped-query attention whose projections are experts under any registered router.

    A row that no expert takes has zeros for its query, key and value, and goes on through the residual.

    Source: experts in all projections under one choice, Uni-Perceiver-MoE, https://arxiv.org/abs/2206.04674; heads of
    their own, Mixture of Attention Heads, https://arxiv.org/abs/2210.05144, and Mod-Squad,
    https://arxiv.org/abs/2212.08066.
    """

    routes = True

    @dataclass(frozen=True, kw_only=True)
    class Config(Attention.Config):
        """Attention with experts."""

        num_experts: int = 8
        """Experts E in the banks."""
        router: Router.Config = field(default_factory=TopKRouter.Config)
        """Which expert takes which row, once for all sites."""
        routed_sites: tuple[str, ...] = PROJECTIONS
        """The projections that are experts; the others have tower maps."""
        own_heads: bool = False
        """Whether the ``num_heads`` are those of one expert: a row attends with the heads of every expert that it
        chose, and their outputs are added up, weighed. Else a row's choices are added up at every site. Then
        ``routed_sites`` are q_proj and o_proj."""

        def __post_init__(self) -> None:
            super().__post_init__()
            self.check_positive("num_experts")
            sites, known = tuple(self.routed_sites), ", ".join(PROJECTIONS)
            if not sites or not set(sites) <= set(PROJECTIONS) or len(set(sites)) < len(sites):
                raise ConfigError(f"routed_sites must name some of {known}, each once, got {sites}")
            both = sorted(set(sites) & set(self.site_towers))
            if both:
                raise ConfigError(f"{both[0]} is routed and has a tower map in site_towers; drop one of them")
            if not self.own_heads:
                return
            if set(sites) != set(HEAD_SITES):
                raise ConfigError(
                    f"own_heads gives experts queries and a way out, so routed_sites must be {HEAD_SITES}, got {sites}"
                )
            if self.qk_norm not in ("none", "rms"):
                raise ConfigError(
                    f"qk_norm {self.qk_norm!r} is over a number of heads, and with own_heads rows differ in it; take "
                    "'rms' or 'none'"
                )
            if self.router.mixes_rows:
                raise ConfigError(
                    f"own_heads lets a row attend for each expert that it chose, and {type(self.router).__qualname__} "
                    "mixes rows; leave own_heads out"
                )

        @property
        def needs_key_order(self) -> bool:
            return super().needs_key_order or self.router.needs_key_order

        @property
        def is_causal(self) -> bool:
            return self.router.is_causal

        @property
        def has_causal_form(self) -> bool:
            return self.router.has_causal_form

        @property
        def num_token_ids(self) -> int:
            return self.router.num_token_ids

        @property
        def tp_plan(self) -> dict[str, str]:
            return {}  # experts lie whole on every rank

        @property
        def head_copies(self) -> int:
            return self.router.most_experts_per_token(self.num_experts) if self.own_heads else 1

        def copies_met(self, site: str, modality: int) -> float | None:
            return self.router.experts_per_token(self.num_experts, modality) if site in self.routed_sites else 1.0

    def __init__(
        self, config: RoutedAttention.Config, *, hidden_size: int, num_modalities: int, layer_idx: int
    ) -> None:
        super().__init__(config, hidden_size=hidden_size, num_modalities=num_modalities, layer_idx=layer_idx)
        self.declared = config  # ``config`` is the model's in every attention
        self.num_experts = config.num_experts
        self.router = config.router.build(
            hidden_size=hidden_size, num_experts=config.num_experts, num_modalities=num_modalities
        )
        heads, kv_heads = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        shapes = {
            "q_proj": (hidden_size, heads, config.bias),
            "k_proj": (hidden_size, kv_heads, config.bias and config.key_bias),
            "v_proj": (hidden_size, kv_heads, config.bias),
            "o_proj": (heads, hidden_size, config.output_bias),
        }
        apart = dict(zip(HEAD_SITES, ("split", "join"), strict=True)) if config.own_heads else {}
        for site in config.routed_sites:
            bank = ExpertLinear(config.num_experts, *shapes[site], apart.get(site, "sum"), self.num_heads)
            setattr(self, site, bank)
        self.num_key_value_groups *= config.head_copies

    def forward(  # type: ignore[override]
        self, x: Tensor, rows: RowLayout, mask: AttentionMask, cache: Any = None
    ) -> tuple[Tensor, Tensor | None, Routing]:
        """As :meth:`Attention.forward`, and the routing."""
        with rows.choosing():
            routing = self.router(x, rows)
        sent: Mixed | Sent
        if routing.slots is not None:
            sent = Mixed(routing.slots, rows)
        else:
            most = self.declared.head_copies if self.declared.own_heads else None
            sent = Sent.of(routing, rows, self.num_experts, most)
        mixed, weights = super().forward(x, dataclasses.replace(rows, sent=sent), mask, cache)
        return mixed, weights, routing

    def update(self, routing: Routing) -> None:
        """Takes in what a training step routed."""
        self.router.update(routing)


__all__ = ["RoutedAttention"]

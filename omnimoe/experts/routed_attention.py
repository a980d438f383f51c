"""Experts inside of what mixes positions: a router above the banks of its projections, one choice for all of them."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from omnimoe.config import ConfigError
from omnimoe.experts.beside import UnderRouter
from omnimoe.experts.sent import Mixed, Sent
from omnimoe.layers import (
    Attention,
    AttentionMask,
    BankLinear,
    BaseAttention,
    ExpertLinear,
    RowLayout,
    StateSpace,
    register_attention,
)
from omnimoe.routers import Router, Routing, Scorer, TopKRouter

HEAD_SITES = ("q_proj", "o_proj")
"""What experts with heads of their own have copies of."""


class RoutedProjections(BaseAttention):
    """Put in front of a part whose projections are banks, it makes experts of them, under any registered router.

    A row that no expert takes has zeros for its projections, and goes on through the residual. A part of one's own is
    ``class Mine(RoutedProjections, SinkAttention)`` with a ``Config(RoutedProjections.Config, SinkAttention.Config)``.
    """

    routes = True
    sites: ClassVar[tuple[str, ...]] = ("q_proj", "k_proj", "v_proj", "o_proj")
    """Projections of the part that may be experts."""

    @dataclass(frozen=True, kw_only=True)
    class Config(UnderRouter, BaseAttention.Config):
        """Projections that are experts."""

        num_experts: int = 8
        """Experts E in the banks."""
        router: Router.Config = field(default_factory=TopKRouter.Config)
        """Which expert takes which row, once for all sites."""
        routed_sites: tuple[str, ...] = ()
        """The projections that are experts; the others have tower maps. All where empty."""
        num_shared_experts: int = 0
        """Experts S that every row meets beside those."""
        shared_gate: str = "none"
        """Weight of the shared experts, as in :class:`RoutedExperts`."""
        num_zero_experts: int = 0
        """Experts that give zero: a row that chooses one takes fewer of the others."""

        def __post_init__(self) -> None:
            super().__post_init__()
            self.check_positive("num_experts")
            known, sites = self._target_sites, tuple(self.routed_sites)
            if not set(sites) <= set(known) or len(set(sites)) < len(sites):
                raise ConfigError(f"routed_sites must name some of {', '.join(known)}, each once, got {sites}")
            both = sorted(set(self.experts_at) & set(getattr(self, "site_towers", {})))
            if both:
                raise ConfigError(f"{both[0]} is routed and has a tower map in site_towers; drop one of them")
            self.check_beside()

        @property
        def experts_at(self) -> tuple[str, ...]:
            """The sites that are experts."""
            return tuple(self.routed_sites) or self._target_sites

        @property
        def _target_sites(self) -> tuple[str, ...]:
            target: Any = type(self).target
            return target.sites

        @property
        def free_experts(self) -> tuple[str, ...]:
            """The kind of each expert behind the bank's."""
            return ("zero",) * self.num_zero_experts

        @property
        def needs_key_order(self) -> bool:
            return super().needs_key_order or self.router.needs_key_order

        @property
        def tp_plan(self) -> dict[str, str]:
            return {}  # experts lie whole on every rank

        def copies_met(self, site: str, modality: int) -> float | None:
            """Copies of a projection that a token of ``modality`` meets on average; None where unknown."""
            if site not in self.experts_at:
                return 1.0
            own = len(self.router.reached_experts(self.num_experts, modality))
            chosen = self.router.experts_per_token(self.num_experts + self.num_zero_experts, modality)
            return None if chosen is None else chosen * own / (own + self.num_zero_experts) + self.num_shared_experts

    def __init__(
        self, config: RoutedProjections.Config, *, hidden_size: int, num_modalities: int, layer_idx: int
    ) -> None:
        super().__init__(config, hidden_size=hidden_size, num_modalities=num_modalities, layer_idx=layer_idx)
        self.declared = config  # ``config`` is the model's in every attention
        self.num_experts = config.num_experts
        self.router = config.router.build(
            hidden_size=hidden_size,
            num_experts=config.num_experts,
            num_modalities=num_modalities,
            **config.given_beside(),
        )
        self.shared_gate = Scorer(hidden_size, 1) if config.shared_gate == "sigmoid" else None
        for site in config.experts_at:
            setattr(self, site, self._experts_of(site, getattr(self, site, None)))

    def _experts_of(self, site: str, held: Any) -> ExpertLinear:
        """The experts that take the place of a bank of the same shape."""
        if not isinstance(held, BankLinear) or type(held).forward is not BankLinear.forward:
            raise ConfigError(
                f"{site} of {type(self).__name__} is {type(held).__name__} and no plain bank of linear maps, so it "
                "cannot be experts; leave it out of routed_sites"
            )
        copies = self.num_experts + self.declared.num_shared_experts
        _, out_features, in_features = held.weight.shape
        bank = ExpertLinear(copies, in_features, out_features, held.bias is not None, **self.meeting(site))
        bank.initial = held.initial
        bank.reset_parameters()
        return bank

    def meeting(self, site: str) -> dict[str, Any]:
        """How a row meets several experts of a site: arguments of :class:`ExpertLinear`."""
        return {}

    @property
    def most(self) -> int | None:
        """The most experts of a row, where what they give is kept apart."""
        return None

    def forward(self, x: Tensor, rows: RowLayout, mask: AttentionMask, cache: Any = None) -> Any:
        """As the part behind it, and the routing: ``(N, D)`` rows, attention weights or None, :class:`Routing`."""
        with rows.choosing():
            routing = self.router(x, rows)
        ways: list[Mixed | Sent] = []
        if routing.slots is not None:
            ways.append(Mixed(routing.slots, rows))
        entries = self._entries(x, routing)
        if entries is not None:
            ways.append(Sent.of(*entries, rows, self.num_experts + self.declared.num_shared_experts, self.most))
        out = super().forward(x, dataclasses.replace(rows, sent=tuple(ways)), mask, cache)
        mixed, weights = out if isinstance(out, tuple) else (out, None)
        return mixed, weights, routing

    def _entries(self, x: Tensor, routing: Routing) -> tuple[Tensor, Tensor, Tensor] | None:
        """Rows, experts and weights of what is sent; shared experts are behind those that are chosen among."""
        count, shared = self.num_experts, self.declared.num_shared_experts
        parts = []
        if routing.slots is None:
            chosen = torch.where(routing.expert_ids < count, routing.expert_ids, -1)
            parts.append((routing.token_index, chosen, routing.expert_weights))
        if shared:
            index = torch.arange(len(x), device=x.device)
            weights = x.new_ones(len(x), shared)
            if self.shared_gate is not None:
                weights = weights * torch.sigmoid(self.shared_gate(x)).to(x.dtype)
            elif routing.shared_weights is not None:
                weights = routing.shared_weights
            ids = torch.arange(count, count + shared, device=x.device).repeat(len(x))
            parts.append((index.repeat_interleave(shared), ids, weights.reshape(-1)))
        if not parts:
            return None
        token_index, expert_ids, expert_weights = (torch.cat(column) for column in zip(*parts, strict=True))
        return token_index, expert_ids, expert_weights

    def update(self, routing: Routing) -> None:
        """Takes in what a training step routed."""
        self.router.update(routing)


@register_attention("routed_attention")
class RoutedAttention(RoutedProjections, Attention):
    """Grouped-query attention whose projections are experts.

    Source: experts in all projections under one choice, Uni-Perceiver-MoE, https://arxiv.org/abs/2206.04674; heads of
    their own, Mixture of Attention Heads, https://arxiv.org/abs/2210.05144, and Mod-Squad,
    https://arxiv.org/abs/2212.08066.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config(RoutedProjections.Config, Attention.Config):
        """Attention with experts."""

        own_heads: bool = False
        """Whether the ``num_heads`` are those of one expert: a row attends with the heads of every expert that it
        meets, and their outputs are added up, weighed. Else a row's choices are added up at every site. The experts
        are then of q_proj and o_proj."""

        def __post_init__(self) -> None:
            super().__post_init__()
            if not self.own_heads:
                return
            if set(self.experts_at) != set(HEAD_SITES):
                raise ConfigError(
                    f"own_heads gives experts queries and a way out, so routed_sites is {HEAD_SITES} or empty, got "
                    f"{tuple(self.routed_sites)}"
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
        def experts_at(self) -> tuple[str, ...]:
            return HEAD_SITES if self.own_heads and not self.routed_sites else super().experts_at

        @property
        def head_copies(self) -> int:
            if not self.own_heads:
                return 1
            return self.router.most_experts_per_token(self.num_experts) + self.num_shared_experts

    declared: RoutedAttention.Config

    def __init__(
        self, config: RoutedAttention.Config, *, hidden_size: int, num_modalities: int, layer_idx: int
    ) -> None:
        super().__init__(config, hidden_size=hidden_size, num_modalities=num_modalities, layer_idx=layer_idx)
        self.num_key_value_groups *= config.head_copies

    def meeting(self, site: str) -> dict[str, Any]:
        """With heads of their own, queries go apart and their outputs come together again."""
        if not self.declared.own_heads:
            return {}
        return {"meets": "split" if site == "q_proj" else "join", "num_heads": self.num_heads}

    @property
    def most(self) -> int | None:
        """See :class:`RoutedProjections`."""
        return self.declared.head_copies if self.declared.own_heads else None


@register_attention("routed_state_space")
class RoutedStateSpace(RoutedProjections, StateSpace):
    """A selective state space whose projections are experts.

    Source: Routing Mamba, https://arxiv.org/abs/2506.18145, which has experts in the projections in and out under one
    choice.
    """

    sites = ("in_proj", "x_proj", "dt_proj", "out_proj")

    @dataclass(frozen=True, kw_only=True)
    class Config(RoutedProjections.Config, StateSpace.Config):
        """A selective state space with experts."""

        routed_sites: tuple[str, ...] = ("in_proj", "out_proj")
        """The projections that are experts; the others have tower maps. All where empty."""


__all__ = ["RoutedAttention", "RoutedProjections", "RoutedStateSpace"]

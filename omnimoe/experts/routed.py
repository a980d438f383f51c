"""A mixture of experts: a router, a bank over the rows it sorted, a weighted sum, shared experts beside it."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from omnimoe.config import ConfigError
from omnimoe.experts.base import Experts, check_network, register_experts
from omnimoe.layers import BankMLP, RowLayout
from omnimoe.ops import route_plan
from omnimoe.routers import Router, Routing, TopKRouter


@register_experts("routed")
class RoutedExperts(Experts):
    """Experts under any registered router."""

    @dataclass(frozen=True, kw_only=True)
    class Config(Experts.Config):
        """A mixture of experts."""

        num_experts: int = 8
        """Experts E in the bank."""
        intermediate_size: int = 1024
        """Width F of an expert."""
        activation: str = "silu"
        """A name of ``omnimoe.ops.ACTIVATIONS``."""
        gated: bool = True
        """Multiply by the activated gate."""
        router: Router.Config = field(default_factory=TopKRouter.Config)
        """Which expert takes which row."""
        num_shared_experts: int = 0
        """Experts that every row meets with weight one, kept as one network that many times as wide."""

        def __post_init__(self) -> None:
            super().__post_init__()
            check_network(self.intermediate_size, self.activation)
            if self.num_shared_experts < 0:
                raise ConfigError(f"num_shared_experts must be at least 0, got {self.num_shared_experts}")
            if self.num_experts < 1:
                raise ConfigError(f"num_experts must be at least 1, got {self.num_experts}")

        @property
        def needs_key_order(self) -> bool:
            return self.router.needs_key_order

        @property
        def is_causal(self) -> bool:
            return self.router.is_causal

        def active_params(self, hidden_size: int, modality: int) -> float:
            expert = (3 if self.gated else 2) * hidden_size * self.intermediate_size
            chosen = self.router.experts_per_token(self.num_experts, modality)
            router = self.router.router_params(hidden_size, self.num_experts, modality)
            return expert * (chosen + self.num_shared_experts) + router

    def __init__(self, config: RoutedExperts.Config, *, hidden_size: int, num_modalities: int, layer_idx: int) -> None:
        super().__init__()
        self.num_experts = config.num_experts
        self.router = config.router.build(
            hidden_size=hidden_size, num_experts=config.num_experts, num_modalities=num_modalities
        )
        width, shared = config.intermediate_size, config.num_shared_experts
        self.experts = BankMLP(config.num_experts, hidden_size, width, config.activation, config.gated)
        self.shared_experts = None
        if shared:
            self.shared_experts = BankMLP(1, hidden_size, shared * width, config.activation, config.gated)

    def forward(self, x: Tensor, rows: RowLayout) -> tuple[Tensor, Routing]:
        """``(N, D)`` rows to ``(N, D)``; a row that no expert takes gets the shared experts alone, or zeros."""
        routing = self.router(x, rows)
        plan = route_plan(routing.expert_ids, self.num_experts)
        token_index, weights = routing.token_index[plan.order], routing.expert_weights[plan.order]
        y = self.experts(x, plan.offsets, token_index=token_index, weights=weights)
        if self.shared_experts is not None:
            y = y + self.shared_experts(x, torch.full((1,), len(x), dtype=torch.int32, device=x.device))
        return y, routing

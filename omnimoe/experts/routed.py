"""A mixture of experts: a router, a bank over the rows it sorted, a weighted sum, shared and free experts beside it."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from omnimoe.config import ConfigError
from omnimoe.experts.base import Experts, check_network, register_experts
from omnimoe.experts.beside import UnderRouter
from omnimoe.experts.free import FreeExperts
from omnimoe.experts.pooled import PooledMLP
from omnimoe.experts.sent import Sent
from omnimoe.layers import BankMLP, RowLayout
from omnimoe.ops import combine
from omnimoe.routers import Router, Routing, Scorer, TopKRouter

WEIGHTS_ON = ("output", "input")


@register_experts("routed")
class RoutedExperts(Experts):
    """Experts under any registered router."""

    @dataclass(frozen=True, kw_only=True)
    class Config(UnderRouter, Experts.Config):
        """A mixture of experts."""

        num_experts: int = 8
        """Experts E in the bank."""
        intermediate_size: int = 1024
        """Width F of an expert; where there are ``pools``, of a shared one."""
        pools: tuple[tuple[int, int], ...] = ()
        """Experts and their width, pool by pool, where widths differ (ERNIE-4.5-VL); the experts sum to
        ``num_experts``. Each pool is a bank of its own."""
        activation: str = "silu"
        """A name of ``omnimoe.ops.ACTIVATIONS``."""
        gated: bool = True
        """Multiply by the activated gate."""
        bias: bool = False
        """Biases in the experts' networks (gpt-oss)."""
        router: Router.Config = field(default_factory=TopKRouter.Config)
        """Which expert takes which row."""
        weights_on: str = "output"
        """Whether a weight multiplies what an expert gives, ``"output"``, or what it gets, ``"input"`` (Llama 4)."""
        num_shared_experts: int = 0
        """Experts that every row meets, kept as one network that many times as wide."""
        shared_intermediate_size: int | None = None
        """Width of a shared expert; that of the others where None."""
        shared_gate: str = "none"
        """Weight of the shared experts: one, ``"none"``; a ``"sigmoid"`` of their own (Qwen2-MoE); or a part of the
        ``"softmax"`` over what the router chose, each expert its own (Uni-MoE-2.0)."""
        num_zero_experts: int = 0
        """Experts that give zero: a row that chooses one takes fewer of the others."""
        num_identity_experts: int = 0
        """Experts that give back what they get."""
        num_constant_experts: int = 0
        """Experts that mix what they get with a learned vector."""

        def __post_init__(self) -> None:
            super().__post_init__()
            check_network(self.intermediate_size, self.activation, self.gated)
            if self.num_experts < 1:
                raise ConfigError(f"num_experts must be at least 1, got {self.num_experts}")
            if any(
                len(pool) != 2 or not all(isinstance(size, int) and size > 0 for size in pool) for pool in self.pools
            ):
                raise ConfigError(f"pools must give experts and width of each pool, both at least 1, got {self.pools}")
            if self.pools and sum(count for count, _ in self.pools) != self.num_experts:
                raise ConfigError(f"the experts of pools {self.pools} must sum to num_experts {self.num_experts}")
            if self.shared_intermediate_size is not None:
                check_network(self.shared_intermediate_size, self.activation, self.gated)
            if self.weights_on not in WEIGHTS_ON:
                raise ConfigError(f"unknown weights_on {self.weights_on!r}; known: {', '.join(WEIGHTS_ON)}")
            self.check_beside()
            if self.weights_on == "input" and self.router.mixes_rows:
                raise ConfigError(
                    f"weights_on='input' scales rows that experts get, and {type(self.router).__qualname__} gives them "
                    "mixtures of rows; leave it out"
                )

        @property
        def free_experts(self) -> tuple[str, ...]:
            """The kind of each expert behind the bank's."""
            return (
                ("zero",) * self.num_zero_experts
                + ("identity",) * self.num_identity_experts
                + ("constant",) * self.num_constant_experts
            )

        @property
        def needs_key_order(self) -> bool:
            return self.router.needs_key_order

        @property
        def tp_plan(self) -> dict[str, str]:
            if self.bias or self.router.mixes_rows:
                return {}  # a bias after the second product would be added on every device
            banks = (self._banks, "shared_experts") if self.num_shared_experts else (self._banks,)
            return dict.fromkeys(banks, "bank_mlp")

        @property
        def ep_plan(self) -> dict[str, str]:
            if self.bias or self.router.mixes_rows:
                return {}  # slots are of all experts at once
            parameters = (f"{self._banks}.{name}" for name in ("gate_up_proj", "down_proj"))
            return {self._banks: "ep_dispatch_experts", **dict.fromkeys(parameters, "grouped_gemm")}

        @property
        def _banks(self) -> str:
            """Where the banks lie, as plans spell it."""
            return "experts.pools.*" if self.pools else "experts"

        def width_of_experts(self, modality: int) -> float:
            """Mean width of the experts that a row of ``modality`` may be sent to."""
            if not self.pools:
                return self.intermediate_size
            widths = [width for count, width in self.pools for _ in range(count)]
            reached = self.router.reached_experts(self.num_experts, modality)
            return sum(widths[expert] for expert in reached) / len(reached)

        def active_params(self, hidden_size: int, modality: int) -> float | None:
            """As many choices fall to free experts as would if all experts were chosen alike."""
            matrices, free = (3 if self.gated else 2) * hidden_size, len(self.free_experts)
            chosen = self.router.experts_per_token(self.num_experts + free, modality)
            if chosen is None:
                return None
            own_bank = len(self.router.reached_experts(self.num_experts, modality))
            chosen *= own_bank / (own_bank + free)
            shared = self.num_shared_experts * (self.shared_intermediate_size or self.intermediate_size)
            own = 2 * hidden_size * self.num_constant_experts + hidden_size * (self.shared_gate == "sigmoid")
            router = self.router.router_params(hidden_size, self.num_scored_experts, modality)
            return matrices * (chosen * self.width_of_experts(modality) + shared) + own + router

    def __init__(self, config: RoutedExperts.Config, *, hidden_size: int, num_modalities: int, layer_idx: int) -> None:
        super().__init__()
        self.config = config
        self.num_experts = config.num_experts
        self.router = config.router.build(
            hidden_size=hidden_size,
            num_experts=config.num_experts,
            num_modalities=num_modalities,
            **config.given_beside(),
        )
        network = config.activation, config.gated, config.bias
        self.experts: BankMLP | PooledMLP
        if config.pools:
            self.experts = PooledMLP(config.pools, hidden_size, *network)
        else:
            self.experts = BankMLP(config.num_experts, hidden_size, config.intermediate_size, *network)
        self.free_experts = FreeExperts(hidden_size, config.free_experts) if config.free_experts else None
        width, shared = config.shared_intermediate_size or config.intermediate_size, config.num_shared_experts
        copies, width = (shared, width) if config.shared_gate == "softmax" else (1, shared * width)
        self.shared_experts = BankMLP(copies, hidden_size, width, *network) if shared else None
        self.shared_gate = Scorer(hidden_size, 1) if config.shared_gate == "sigmoid" else None

    def forward(self, x: Tensor, rows: RowLayout) -> tuple[Tensor, Routing]:
        """``(N, D)`` rows to ``(N, D)``; a row that no expert takes gets the shared experts alone, or zeros."""
        with rows.choosing():
            routing = self.router(x, rows)
        y = self._routed(x, rows, routing)
        if self.free_experts is not None:
            y = y + self.free_experts(x, routing, self.num_experts)
        if self.shared_experts is not None:
            y = y + self._shared(x, routing.shared_weights)
        return y, routing

    def _routed(self, x: Tensor, rows: RowLayout, routing: Routing) -> Tensor:
        """``(N, D)`` rows to ``(N, D)``, the experts of the bank alone."""
        if routing.slots is not None:
            return routing.slots.through(self.experts, x, rows)
        sent = Sent.of(routing.token_index, routing.expert_ids, routing.expert_weights, rows, self.num_experts)
        if self.config.weights_on == "input":
            given = x[sent.token_index] * sent.weights.unsqueeze(1)
            y = self.experts(given, sent.offsets, compute=rows.compute)
            return combine(y, sent.token_index, torch.ones_like(sent.weights), len(x))
        return self.experts(x, sent.offsets, token_index=sent.token_index, weights=sent.weights, compute=rows.compute)

    def _shared(self, x: Tensor, weights: Tensor | None) -> Tensor:
        """``(N, D)`` rows to ``(N, D)``, the shared experts alone."""
        assert self.shared_experts is not None
        copies = self.config.num_gated_experts or 1  # an adapter may stand in the place of the bank
        ends = torch.full((copies,), x.shape[0], dtype=torch.int32, device=x.device)
        if copies > 1:
            ends = ends.cumsum(0, dtype=torch.int32)
        if self.shared_gate is not None:
            return self.shared_experts(x, ends) * torch.sigmoid(self.shared_gate(x)).to(x.dtype)
        if weights is None:
            return self.shared_experts(x, ends)
        token_index = torch.arange(len(x), device=x.device).repeat(weights.shape[1])
        return self.shared_experts(x, ends, token_index=token_index, weights=weights.t().reshape(-1))

"""Token choice: every row takes its best experts."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from omnimoe.config import ConfigError
from omnimoe.layers import RowLayout
from omnimoe.routers.base import Router, Routing, register_router
from omnimoe.routers.losses import load_balance_loss, router_z_loss
from omnimoe.routers.scores import SCORES, Scorer


@register_router("top_k")
class TopKRouter(Router):
    """Scores all experts and keeps the ``top_k`` best of each row; no row is dropped.

    Source: Mixtral (normalised) and OLMoE (not), https://arxiv.org/abs/2401.04088, https://arxiv.org/abs/2409.02060.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config(Router.Config):
        """Token choice."""

        top_k: int = 2
        """Experts of a row."""
        score: str = "softmax"
        """``"softmax"`` or ``"sigmoid"``, over all experts, before the choice."""
        normalize: bool = True
        """Divide the chosen scores by their sum, where several are chosen."""
        load_balance_coef: float = 0.01
        """Coefficient of the load-balance loss."""
        z_loss_coef: float = 0.0
        """Coefficient of the router z-loss."""

        def __post_init__(self) -> None:
            super().__post_init__()
            if self.score not in SCORES:
                raise ConfigError(f"unknown score {self.score!r}; known: {', '.join(SCORES)}")
            if self.top_k < 1:
                raise ConfigError(f"top_k must be at least 1, got {self.top_k}")

        @property
        def needs_key_order(self) -> bool:
            return False

        def experts_per_token(self, num_experts: int, modality: int) -> float:
            return float(self.top_k)

        def router_params(self, hidden_size: int, num_experts: int, modality: int | None = None) -> int:
            return hidden_size * num_experts

    def __init__(self, config: TopKRouter.Config, *, hidden_size: int, num_experts: int, num_modalities: int) -> None:
        super().__init__()
        if config.top_k > num_experts:
            raise ConfigError(f"top_k {config.top_k} exceeds the {num_experts} experts; lower it or add experts")
        self.config = config
        self.num_experts = num_experts
        self.scorer = Scorer(hidden_size, num_experts)

    def forward(self, x: Tensor, rows: RowLayout) -> Routing:
        """``(N, D)`` rows to N·K entries, the K of a row side by side."""
        config = self.config
        logits = self.scorer(x)
        scores = SCORES[config.score](logits)
        weights, chosen = scores.topk(config.top_k, dim=-1)
        if config.normalize and config.top_k > 1:
            weights = weights / weights.sum(-1, keepdim=True).clamp_min(torch.finfo(weights.dtype).tiny)
        token_index = torch.arange(len(x), device=x.device).repeat_interleave(config.top_k)
        expert_ids = chosen.reshape(-1)
        losses = {}
        if config.load_balance_coef:
            probs = scores if config.score == "softmax" else scores / scores.sum(-1, keepdim=True)
            losses["load_balance"] = config.load_balance_coef * load_balance_loss(probs, expert_ids, config.top_k)
        if config.z_loss_coef:
            losses["router_z"] = config.z_loss_coef * router_z_loss(logits)
        return Routing(token_index, expert_ids, weights.reshape(-1).to(x.dtype), logits, losses)

"""Expert choice: every expert takes its best rows.

The choice looks at all rows of the batch, later ones too, so it is for training and scoring. Where a cache is in use a
row may not depend on others; then an expert takes every row whose score reaches its cut-off, a running mean of the
lowest score it took in training (the rule of Expert Threshold routing, https://arxiv.org/abs/2603.11535).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from omnimoe.config import ConfigError
from omnimoe.layers import RowLayout
from omnimoe.routers.base import Router, Routing, register_router
from omnimoe.routers.scores import SCORES, Scorer


@register_router("expert_choice")
class ExpertChoiceRouter(Router):
    """Each expert takes the ``ceil(capacity_factor * N / E)`` rows that score highest for it.

    Source: https://arxiv.org/abs/2202.09368 with softmax; MoMa, https://arxiv.org/abs/2407.21770, with sigmoid.
    """

    is_causal: ClassVar[bool] = False
    cutoff: Tensor

    @dataclass(frozen=True, kw_only=True)
    class Config(Router.Config):
        """Expert choice."""

        capacity_factor: float = 1.0
        """Experts that a row meets on average."""
        score: str = "sigmoid"
        """``"sigmoid"`` (MoMa) or ``"softmax"`` over experts."""
        cutoff_momentum: float = 0.99
        """Share of the old cut-off that a training step keeps."""

        def __post_init__(self) -> None:
            super().__post_init__()
            if self.score not in SCORES:
                raise ConfigError(f"unknown score {self.score!r}; known: {', '.join(SCORES)}")
            if self.capacity_factor <= 0:
                raise ConfigError(f"capacity_factor must be positive, got {self.capacity_factor}")

        @property
        def needs_key_order(self) -> bool:
            return False

        def experts_per_token(self, num_experts: int, modality: int) -> float:
            return min(self.capacity_factor, float(num_experts))

        def router_params(self, hidden_size: int, num_experts: int, modality: int | None = None) -> int:
            return hidden_size * num_experts

    def __init__(
        self, config: ExpertChoiceRouter.Config, *, hidden_size: int, num_experts: int, num_modalities: int
    ) -> None:
        super().__init__()
        self.config = config
        self.num_experts = num_experts
        self.scorer = Scorer(hidden_size, num_experts)
        self.register_buffer("cutoff", self.initial_buffers()["cutoff"])

    def initial_buffers(self) -> dict[str, Tensor]:
        """The cut-off starts where an untrained router's scores lie."""
        start = 0.5 if self.config.score == "sigmoid" else 1 / self.num_experts
        return {"cutoff": torch.full((self.num_experts,), start, dtype=torch.float32)}

    def forward(self, x: Tensor, rows: RowLayout) -> Routing:
        """``(N, D)`` rows; entries come expert by expert."""
        logits = self.scorer(x)
        scores = SCORES[self.config.score](logits)
        if torch.compiler.is_compiling():
            return self._traced(logits, scores, rows, x.dtype)
        if rows.routes_causally:
            expert_ids, token_index = (scores >= self.cutoff).t().nonzero().unbind(1)
            return Routing(token_index, expert_ids, scores[token_index, expert_ids].to(x.dtype), logits)
        capacity = min(len(x), math.ceil(self.config.capacity_factor * len(x) / self.num_experts))
        weights, token_index = scores.t().topk(capacity, dim=-1)
        expert_ids = torch.arange(self.num_experts, device=x.device).repeat_interleave(capacity)
        cutoff = weights[:, -1].detach() if capacity else None
        return Routing(token_index.reshape(-1), expert_ids, weights.reshape(-1).to(x.dtype), logits, {}, cutoff)

    def _traced(self, logits: Tensor, scores: Tensor, rows: RowLayout, dtype: torch.dtype) -> Routing:
        """The same with shapes that depend on no value: entries that are not taken go to no expert."""
        counted = torch.ones_like(scores[:, 0], dtype=torch.bool) if rows.counted is None else rows.counted
        experts = torch.arange(self.num_experts, device=scores.device).unsqueeze(1)
        if rows.routes_causally:
            taken = ((scores >= self.cutoff) & counted.unsqueeze(1)).t()  # (E, N)
            weights, cutoff = scores.t(), None
            token_index = torch.arange(len(scores), device=scores.device).expand(self.num_experts, -1)
        else:
            most = min(len(scores), math.ceil(self.config.capacity_factor * len(scores) / self.num_experts))
            number = counted.sum()
            capacity = (self.config.capacity_factor * number.double() / self.num_experts).ceil().long()
            capacity = torch.minimum(capacity, number)
            weights, token_index = scores.masked_fill(~counted.unsqueeze(1), float("-inf")).t().topk(most, dim=-1)
            taken = (torch.arange(most, device=scores.device) < capacity).expand(self.num_experts, -1)
            last = weights.detach().gather(1, (capacity - 1).clamp_min(0).expand(self.num_experts, 1)).squeeze(1)
            cutoff = torch.where(capacity > 0, last, float("nan"))
            weights = torch.where(taken, weights, 0)
        expert_ids = torch.where(taken, experts, -1).reshape(-1)
        return Routing(token_index.reshape(-1), expert_ids, weights.reshape(-1).to(dtype), logits, {}, cutoff)

    @torch.no_grad()
    def update(self, routing: Routing) -> None:
        """Moves the cut-off towards the lowest score each expert took."""
        if routing.cutoff is not None:
            seen = routing.cutoff.isfinite()
            moved = torch.lerp(routing.cutoff.to(self.cutoff), self.cutoff, self.config.cutoff_momentum)
            self.cutoff.copy_(torch.where(seen, moved, self.cutoff))

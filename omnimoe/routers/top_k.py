"""Token choice: every row takes its best experts.

Published routers are settings of this one; docs/routers.md has the table.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from omnimoe.config import ConfigError
from omnimoe.layers import RowLayout
from omnimoe.routers.balance import BalancedRouter
from omnimoe.routers.base import Routing, register_router
from omnimoe.routers.capacity import POOLS, PRIORITIES, capacity_of, with_room
from omnimoe.routers.scores import SCORES, Scorer, check_score, shares

GROUP_SCORES = {"best": 1, "best_two": 2}
"""What a group of experts is judged by: that many of its best scores, summed (DeepSeek-V2 and V3)."""


@register_router("top_k")
class TopKRouter(BalancedRouter):
    """Scores all experts and keeps the ``top_k`` best of each row; none is dropped unless there is a capacity.

    Source: Mixtral (normalised) and OLMoE (not), https://arxiv.org/abs/2401.04088, https://arxiv.org/abs/2409.02060.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config(BalancedRouter.Config):
        """Token choice."""

        top_k: int = 2
        """Experts of a row."""
        score: str = "softmax"
        """``"softmax"``, ``"sigmoid"`` or ``"sqrt_softplus"``, over all experts, before the choice."""
        normalize: bool = True
        """Divide the chosen scores by their sum, where several are chosen."""
        normalize_min: float = 0.0
        """The least that they are divided by, where their sum is smaller (ERNIE 4.5: 1e-12)."""
        routed_scaling_factor: float = 1.0
        """What the weights are multiplied by in the end."""
        top_p: float | None = None
        """Keep only as many of the ``top_k`` as it takes to reach this share of the scores; None keeps all."""
        logit_bias: bool = False
        """Add a learned number to each expert's logit."""
        keep_float32: bool = False
        """Keep the router's weights in float32 in a model of half precision."""
        num_groups: int = 1
        """Groups of neighbouring experts, of one size."""
        num_groups_kept: int = 1
        """Groups that a row may choose from."""
        group_score: str = "best_two"
        """A group is judged by its ``"best"`` score or by the sum of its ``"best_two"``."""
        zero_keeps_share: bool = True
        """Whether experts that give zero keep their part when chosen scores are divided by their sum."""
        noise: float = 0.0
        """Standard deviation of the normal noise that training adds to logits."""
        later_choice_threshold: float | None = None
        """Training keeps a second or later choice with the probability of its share of the chosen scores over this: 0.5
        is GShard's rule, 0.2 ST-MoE's. None keeps all."""
        input_jitter: float = 0.0
        """Training multiplies what the router reads by a factor drawn between 1 minus and 1 plus this."""
        capacity_factor: float | None = None
        """Room of an expert, in even shares of the choices of the rows that are there; None for no limit, and nothing
        is dropped."""
        capacity: int | None = None
        """Room of an expert, in rows, in place of ``capacity_factor``."""
        capacity_pool: str = "batch"
        """The rows that share the room: all of the ``"batch"``, or those of a ``"sequence"``."""
        capacity_priority: str = "position"
        """Who comes first: the earlier ``"position"``, or the better best ``"score"``."""
        normalize_kept: bool = False
        """Divide by the sum of what was not dropped, rather than by that of what was chosen."""
        load_balance_coef: float = 0.01
        """Coefficient of the load-balance loss."""

        def __post_init__(self) -> None:
            super().__post_init__()
            check_score(self.score)
            if self.top_k < 1:
                raise ConfigError(f"top_k must be at least 1, got {self.top_k}")
            for name, known in (
                ("group_score", GROUP_SCORES),
                ("capacity_pool", POOLS),
                ("capacity_priority", PRIORITIES),
            ):
                if getattr(self, name) not in known:
                    raise ConfigError(f"unknown {name} {getattr(self, name)!r}; known: {', '.join(known)}")
            if not 1 <= self.num_groups_kept <= self.num_groups:
                raise ConfigError(f"num_groups_kept {self.num_groups_kept} must be 1 to num_groups {self.num_groups}")
            if self.top_p is not None and not 0 < self.top_p <= 1:
                raise ConfigError(f"top_p must lie above 0 and be at most 1, got {self.top_p}")
            for name in ("capacity_factor", "capacity"):
                given = getattr(self, name)
                if given is not None and not 0 < given < math.inf:
                    raise ConfigError(f"{name} must be finite and positive, got {given}; None sets no limit")
            if not 0 < self.routed_scaling_factor < math.inf:
                raise ConfigError(
                    f"routed_scaling_factor must be finite and positive, got {self.routed_scaling_factor}; 1 leaves "
                    "weights as they are"
                )
            if self.normalize_kept and not self.has_capacity:
                raise ConfigError("normalize_kept=True asks what was dropped, and nothing is; set capacity_factor")
            if self.later_choice_threshold is not None and self.later_choice_threshold <= 0:
                raise ConfigError(f"later_choice_threshold must be positive, got {self.later_choice_threshold}")
            if self.normalize_min < 0:
                raise ConfigError(f"normalize_min must be at least 0, got {self.normalize_min}")
            if self.noise < 0 or not 0 <= self.input_jitter < 1:
                raise ConfigError(
                    f"noise {self.noise} must be at least 0, input_jitter {self.input_jitter} at least 0 and below 1"
                )
            if self.load_coef and not self.noise:
                raise ConfigError("load_coef asks who would choose an expert if noise were drawn again; set noise > 0")

        @property
        def has_capacity(self) -> bool:
            """Whether choices may be dropped."""
            return self.capacity is not None or self.capacity_factor is not None

        @property
        def is_causal(self) -> bool:
            return not self.has_capacity

        @property
        def has_causal_form(self) -> bool:
            return True

        @property
        def needs_key_order(self) -> bool:
            return False

        @property
        def takes_free_experts(self) -> bool:
            return True

        @property
        def takes_gated_experts(self) -> bool:
            return self.score == "softmax" and self.normalize

        def experts_per_token(self, num_experts: int, modality: int) -> float:
            return float(self.top_k)

        def most_experts_per_token(self, num_experts: int) -> int:
            return min(self.top_k, num_experts)

        def router_params(self, hidden_size: int, num_experts: int, modality: int | None = None) -> int:
            return hidden_size * num_experts

    config: TopKRouter.Config

    def __init__(
        self,
        config: TopKRouter.Config,
        *,
        hidden_size: int,
        num_experts: int,
        num_modalities: int,
        free_experts: Sequence[str] = (),
        num_gated_experts: int = 0,
    ) -> None:
        super().__init__(config, num_experts=num_experts, num_free=len(free_experts), num_keys=num_modalities)
        count = num_experts + len(free_experts)
        size, rest = divmod(count, config.num_groups)
        if rest or size < GROUP_SCORES[config.group_score] * (config.num_groups > 1):
            raise ConfigError(
                f"{count} experts do not make {config.num_groups} equal groups with the {config.group_score!r} scores "
                "to judge them by; change num_groups or the number of experts"
            )
        if config.top_k > size * config.num_groups_kept:
            among = f" in {config.num_groups_kept} of {config.num_groups} groups" if config.num_groups > 1 else ""
            raise ConfigError(
                f"top_k {config.top_k} exceeds the {size * config.num_groups_kept} experts{among}; "
                "lower it or add experts"
            )
        self.zero_ids = tuple(num_experts + i for i, kind in enumerate(free_experts) if kind == "zero")
        self.num_gated = num_gated_experts
        self.scorer = Scorer(hidden_size, count + num_gated_experts, config.logit_bias, config.keep_float32)

    def forward(self, x: Tensor, rows: RowLayout) -> Routing:
        """``(N, D)`` rows to N·K entries, the K of a row side by side."""
        config = self.config
        if self.training and config.input_jitter:
            x = x * torch.empty_like(x).uniform_(1 - config.input_jitter, 1 + config.input_jitter)
        logits, gated = self.logits(x, rows).split((self.num_experts + self.num_free, self.num_gated), dim=-1)
        noisy = logits + config.noise * torch.randn_like(logits) if self.training and config.noise else logits
        scores = SCORES[config.score](noisy)
        chosen = self.choose(scores, rows)
        if self.training and config.later_choice_threshold is not None:
            chosen = self._drawn(scores, chosen)
        if rows.counted is not None:
            chosen = chosen.where(rows.counted.unsqueeze(1), -1)
        dropped, kept = None, chosen
        if config.has_capacity and not rows.routes_causally:
            kept = chosen.where(self._with_room(scores, chosen, rows), -1)
            dropped = (kept != chosen).sum()
        weights, shared_weights = self._weigh(scores, noisy, gated, kept if config.normalize_kept else chosen)
        weights = weights.masked_fill(kept < 0, 0.0)
        losses: dict[str, Tensor] = {}
        if torch.is_grad_enabled() or not rows.routes_causally:  # nobody learns from what is generated
            shared_out = shares(scores, config.score)
            losses = self.balance_losses(shared_out, logits, noisy, chosen, self.scorer.weight, rows)
        return Routing(
            torch.arange(len(x), device=x.device).repeat_interleave(config.top_k),
            kept.reshape(-1),
            weights.reshape(-1).to(x.dtype),
            logits,
            losses,
            key_ids=rows.key_ids,
            shared_weights=None if shared_weights is None else shared_weights.to(x.dtype),
            dropped=dropped,
        )

    def logits(self, x: Tensor, rows: RowLayout) -> Tensor:
        """``(N, D)`` rows to ``(N, E)`` float32, free and gated experts behind the bank's."""
        return self.scorer(x)

    def choose(self, scores: Tensor, rows: RowLayout) -> Tensor:
        """``(N, E)`` scores to ``(N, K)`` ids, the best first; -1 for a choice that the row does not need."""
        config = self.config
        biased = self.biased(scores, rows)
        if config.num_groups > 1:
            biased = self._best_groups(biased)
        chosen = biased.topk(config.top_k, dim=-1).indices
        if config.top_p is None:
            return chosen
        held = shares(scores, config.score).gather(1, chosen)
        return chosen.masked_fill(held.cumsum(-1) - held >= config.top_p, -1)

    def _drawn(self, scores: Tensor, chosen: Tensor) -> Tensor:
        """Choices after the first stay with a probability."""
        held = scores.gather(1, chosen.clamp_min(0))
        share = held / held.sum(-1, keepdim=True).clamp_min(torch.finfo(held.dtype).tiny)
        stays = torch.rand_like(share) * (self.config.later_choice_threshold or 1.0) < share
        stays[:, 0] = True
        return chosen.where(stays, -1)

    def choices_per_token(self) -> int:
        return self.config.top_k

    def _best_groups(self, scores: Tensor) -> Tensor:
        """Minus infinity in the groups that a row does not keep."""
        config = self.config
        grouped = scores.unflatten(-1, (config.num_groups, -1))
        judged = grouped.topk(GROUP_SCORES[config.group_score], dim=-1).values.sum(-1)
        kept = judged.topk(config.num_groups_kept, dim=-1).indices
        is_kept = torch.zeros_like(judged, dtype=torch.bool).scatter(1, kept, True)
        return grouped.masked_fill(~is_kept.unsqueeze(-1), float("-inf")).flatten(1)

    def _with_room(self, scores: Tensor, chosen: Tensor, rows: RowLayout) -> Tensor:
        config = self.config
        capacity: int | Tensor | None = config.capacity
        if capacity is None:
            pool: int | Tensor = len(chosen)
            if config.capacity_pool == "sequence":
                present = torch.ones_like(chosen[:, 0]) if rows.counted is None else rows.counted.long()
                pool = present.new_zeros(rows.batch_size).index_add(0, rows.sequence_ids(), present)
            elif rows.counted is not None:
                pool = rows.counted.sum()
            capacity = capacity_of(config.capacity_factor or 1.0, config.top_k, pool, self.num_experts)
        priority = scores.amax(-1) if config.capacity_priority == "score" else None
        return with_room(chosen, self.num_experts, capacity, rows, pool=config.capacity_pool, priority=priority)

    def _weigh(self, scores: Tensor, logits: Tensor, gated: Tensor, chosen: Tensor) -> tuple[Tensor, Tensor | None]:
        """Weights ``(N, K)`` of what was chosen, and ``(N, S)`` of shared experts that take part."""
        config = self.config
        void = chosen < 0
        for zero in () if config.zero_keeps_share else self.zero_ids:
            void = void | (chosen == zero)
        held = chosen.clamp_min(0)
        if self.num_gated:
            joint = torch.cat((logits.gather(1, held).masked_fill(void, float("-inf")), gated), dim=-1).softmax(-1)
            weights, shared = (joint * config.routed_scaling_factor).split((config.top_k, self.num_gated), dim=-1)
            return weights, shared
        weights = scores.gather(1, held).masked_fill(void, 0.0)
        if config.normalize and config.top_k > 1:
            least = max(config.normalize_min, torch.finfo(weights.dtype).tiny)
            weights = weights / weights.sum(-1, keepdim=True).clamp_min(least)
        return weights * config.routed_scaling_factor, None

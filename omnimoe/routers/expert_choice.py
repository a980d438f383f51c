"""Expert choice: every expert takes its best rows.

The choice looks at all rows of the batch, later ones too, so it is for training and scoring. Where a cache is in use a
row may not depend on others; then one of two rules stands in. ``"cutoff"``: an expert takes every row whose score
reaches a running mean of the lowest score it took in training. ``"auxiliary"``: a small network of its own, trained to
foretell the choice, says which rows it takes (MoMa). Either way the weight is the score.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from omnimoe.config import ConfigError
from omnimoe.layers import RowLayout
from omnimoe.routers.auxiliary import AuxiliaryRouter
from omnimoe.routers.base import Router, Routing, register_router
from omnimoe.routers.pool import LEAST_SHARE, best_of_ranks, share_of
from omnimoe.routers.scores import SCORES, Scorer, check_score

CAUSAL_FORMS = ("cutoff", "auxiliary", "none")
CHOICE_POOLS = ("batch", "ranks")
OF_EXPERT_CHOICE = ("gumbel_noise", "auxiliary_coef")


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
        """``"sigmoid"`` (MoMa), ``"softmax"`` or ``"sqrt_softplus"`` over experts."""
        pool: str = "batch"
        """Rows compete in the ``"batch"`` of a process, or in the batches of all ``"ranks"``, which must hold as many
        positions each."""
        cutoff_momentum: float = 0.99
        """Share of the old cut-off that a training step keeps."""
        causal_form: str = "cutoff"
        """How a row is routed where it may not look at others: by the running ``"cutoff"``, by an ``"auxiliary"``
        router, or not at all, ``"none"``: then the model does not generate."""
        auxiliary_coef: float = 1.0
        """Coefficient of the auxiliary router's loss, the binary cross-entropy of each expert's choice. It moves the
        auxiliary router alone."""
        gumbel_noise: float = 0.0
        """Training adds the difference of two Gumbel draws, times this, to logits: copies of an expert then part."""

        def __post_init__(self) -> None:
            super().__post_init__()
            check_score(self.score)
            if self.pool not in CHOICE_POOLS:
                raise ConfigError(f"unknown pool {self.pool!r}; known: {', '.join(CHOICE_POOLS)}")
            if not LEAST_SHARE <= self.capacity_factor < math.inf:
                raise ConfigError(
                    f"capacity_factor must be positive, at least {LEAST_SHARE}, and finite, got {self.capacity_factor}"
                )
            if not 0 <= self.cutoff_momentum < 1:
                raise ConfigError(
                    f"cutoff_momentum is a share and must lie in 0..1 and below 1, got {self.cutoff_momentum}"
                )
            self.check_not_negative("auxiliary_coef", "gumbel_noise")
            if self.causal_form not in CAUSAL_FORMS:
                raise ConfigError(f"unknown causal_form {self.causal_form!r}; known: {', '.join(CAUSAL_FORMS)}")

        @property
        def has_causal_form(self) -> bool:
            return self.causal_form != "none"

        @property
        def needs_key_order(self) -> bool:
            return False

        def experts_per_token(self, num_experts: int, modality: int) -> float:
            return min(self.capacity_factor, float(num_experts))

        def router_params(self, hidden_size: int, num_experts: int, modality: int | None = None) -> int:
            own = hidden_size * num_experts
            if self.causal_form == "auxiliary":
                own += AuxiliaryRouter.num_params(hidden_size, num_experts)
            return own

    config: ExpertChoiceRouter.Config

    def __init__(
        self, config: ExpertChoiceRouter.Config, *, hidden_size: int, num_experts: int, num_modalities: int
    ) -> None:
        super().__init__()
        self.config = config
        self.num_experts = num_experts
        self.scorer = Scorer(hidden_size, num_experts)
        self.auxiliary = AuxiliaryRouter(hidden_size, num_experts) if config.causal_form == "auxiliary" else None
        self.register_buffer("cutoff", self.initial_buffers()["cutoff"])

    def initial_buffers(self) -> dict[str, Tensor]:
        """The cut-off starts where an untrained router's scores lie."""
        start = SCORES[self.config.score](torch.zeros(self.num_experts))
        return {"cutoff": start.to(torch.float32)}

    def forward(self, x: Tensor, rows: RowLayout) -> Routing:
        """``(N, D)`` rows; entries come expert by expert."""
        logits = self.scorer(x)
        is_noisy = self.training and self.config.gumbel_noise > 0
        noise = _logistic_like(logits) * self.config.gumbel_noise if is_noisy else 0.0
        scores = SCORES[self.config.score](logits + noise)
        if rows.routes_causally:
            return self._entries(scores, self._alone(x, scores), logits, rows, x.dtype)
        if self.config.pool == "ranks":
            chosen, cutoff = self._best_of_ranks(scores, rows)
            routing = self._entries(scores, chosen, logits, rows, x.dtype)
        else:
            weights, token_index, taken, cutoff = self._best(scores, rows)
            experts = torch.arange(self.num_experts, device=x.device).unsqueeze(1).expand_as(token_index)
            routing = Routing(
                token_index.reshape(-1),
                experts.where(taken, -1).reshape(-1),
                weights.reshape(-1).to(x.dtype),
                logits,
            )
        if is_noisy:  # what is compared with it later has no noise
            cutoff = self._lowest(SCORES[self.config.score](logits), rows)
        losses = {}
        if self.auxiliary is not None:
            places = routing.token_index, routing.expert_ids.clamp_min(0)
            is_choice = (routing.expert_ids >= 0).to(torch.float32)
            chosen = torch.zeros_like(scores).index_put(places, is_choice, accumulate=True)
            losses["auxiliary"] = self.config.auxiliary_coef * self.auxiliary.loss(x, chosen, rows.counted)
        return dataclasses.replace(routing, losses=losses, cutoff=cutoff)

    def _lowest(self, scores: Tensor, rows: RowLayout) -> Tensor | None:
        """The score ``(E,)`` that would give each expert its capacity."""
        return self._best_of_ranks(scores, rows)[1] if self.config.pool == "ranks" else self._best(scores, rows)[3]

    def _best_of_ranks(self, scores: Tensor, rows: RowLayout) -> tuple[Tensor, Tensor]:
        share, room = share_of(self.config.capacity_factor, self.num_experts), rows.batch_size * rows.sequence_length
        return best_of_ranks(scores, rows.counted, share, room)

    def _best(self, scores: Tensor, rows: RowLayout) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """Scores and rows ``(E, C)`` of each expert's best, which of them it takes, and the lowest score it took.

        All are taken where all rows count; in a traced graph there may be room for more than are taken.
        """
        share, number = share_of(self.config.capacity_factor, self.num_experts), len(scores)
        most = min(number, -(-number * share.numerator // share.denominator))
        if rows.counted is None:
            weights, token_index = scores.t().topk(most, dim=-1)
            cutoff = weights[:, -1].detach() if most else None
            return weights, token_index, torch.ones_like(token_index, dtype=torch.bool), cutoff
        counted = rows.counted.sum()
        capacity = torch.minimum((counted * share.numerator + share.denominator - 1) // share.denominator, counted)
        weights, token_index = scores.masked_fill(~rows.counted.unsqueeze(1), float("-inf")).t().topk(most, dim=-1)
        taken = (torch.arange(most, device=scores.device) < capacity).expand(self.num_experts, -1)
        last = weights.detach().gather(1, (capacity - 1).clamp_min(0).expand(self.num_experts, 1)).squeeze(1)
        return torch.where(taken, weights, 0), token_index, taken, torch.where(capacity > 0, last, float("nan"))

    def _alone(self, x: Tensor, scores: Tensor) -> Tensor:
        """``(N, E)`` bool, which experts a row goes to where it may not look at others."""
        if self.config.causal_form == "none":
            raise ValueError(
                "expert choice looks at all rows, which a cache does not allow, and this router has no other form; "
                "give it auxiliary ones, omnimoe.add_auxiliary_routers(model), causal_form='auxiliary', and train them"
            )
        if self.auxiliary is not None:
            return self.auxiliary.takes(x)
        return scores >= self.cutoff

    def _entries(self, scores: Tensor, taken: Tensor, logits: Tensor, rows: RowLayout, dtype: torch.dtype) -> Routing:
        """The routing of a choice ``(N, E)``, expert by expert."""
        taken = taken if rows.counted is None else taken & rows.counted.unsqueeze(1)
        if not torch.compiler.is_compiling():
            expert_ids, token_index = taken.t().nonzero().unbind(1)
            return Routing(token_index, expert_ids, scores[token_index, expert_ids].to(dtype), logits)
        # in a traced graph no shape may depend on a value
        experts = torch.arange(self.num_experts, device=scores.device).unsqueeze(1)
        token_index = torch.arange(len(scores), device=scores.device).expand(self.num_experts, -1)
        expert_ids = torch.where(taken.t(), experts, -1)
        weights = torch.where(taken, scores, 0).t()
        return Routing(token_index.reshape(-1), expert_ids.reshape(-1), weights.reshape(-1).to(dtype), logits)

    @torch.no_grad()
    def update(self, routing: Routing) -> None:
        """Moves the cut-off towards the lowest score each expert took."""
        if routing.cutoff is not None:
            seen = routing.cutoff.isfinite()
            moved = torch.lerp(routing.cutoff.to(self.cutoff), self.cutoff, self.config.cutoff_momentum)
            self.cutoff.copy_(torch.where(seen, moved, self.cutoff))


@register_router("expert_threshold")
class ExpertThresholdRouter(ExpertChoiceRouter):
    """An expert takes every row whose score reaches its cut-off, in training too, so that no row looks at others.

    The cut-off follows expert choice: a running mean of the score that would give each expert its capacity.

    Source: Expert Threshold routing, https://arxiv.org/abs/2603.11535; momentum and warm-up are ours.
    """

    is_causal: ClassVar[bool] = True
    steps: Tensor

    @dataclass(frozen=True, kw_only=True)
    class Config(ExpertChoiceRouter.Config):
        """Expert threshold."""

        warmup_steps: int = 100
        """Training steps at first in which the cut-off is that of the batch, as in expert choice."""

        def __post_init__(self) -> None:
            super().__post_init__()
            if self.causal_form != "cutoff":
                raise ConfigError(f"expert threshold routes by its cut-off; causal_form {self.causal_form!r} is none")
            self.check_not_negative("warmup_steps")
            self.check_idle("expert threshold draws no noise and has no auxiliary router", *OF_EXPERT_CHOICE)

    config: ExpertThresholdRouter.Config

    def __init__(self, config: ExpertThresholdRouter.Config, **sizes: int) -> None:
        super().__init__(config, **sizes)
        self.register_buffer("steps", self.initial_buffers()["steps"])

    def initial_buffers(self) -> dict[str, Tensor]:
        """The cut-off, and the steps it has seen."""
        return {**super().initial_buffers(), "steps": torch.zeros((), dtype=torch.int64)}

    def forward(self, x: Tensor, rows: RowLayout) -> Routing:
        """``(N, D)`` rows; entries come expert by expert."""
        logits = self.scorer(x)
        scores = SCORES[self.config.score](logits)
        cutoff, reached = self.cutoff, None
        if self.training and not rows.routes_causally:
            reached = self._lowest(scores, rows)
            if reached is not None:
                warm = (self.steps < self.config.warmup_steps) & reached.isfinite()
                cutoff = torch.where(warm, reached, cutoff)
        routing = self._entries(scores, scores >= cutoff, logits, rows, x.dtype)
        return dataclasses.replace(routing, cutoff=reached)

    @torch.no_grad()
    def update(self, routing: Routing) -> None:
        """Moves the cut-off, and counts the step."""
        super().update(routing)
        self.steps += int(routing.cutoff is not None)


def _logistic_like(logits: Tensor) -> Tensor:
    """The difference of two standard Gumbel draws, which is a standard logistic draw."""
    uniform = torch.rand_like(logits).clamp(1e-6, 1 - 1e-6)
    return uniform.log() - (-uniform).log1p()

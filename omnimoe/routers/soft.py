"""Soft mixture of experts: no row is sent anywhere; experts work on mixtures of all rows of a sequence.

Every slot of every expert gets a convex mixture of the rows, and every row a convex mixture of what came out of the
slots. All is differentiable and nothing is dropped, but each row depends on all others, so a model of these does not
generate.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from omnimoe.config import ConfigError
from omnimoe.layers import RowLayout
from omnimoe.routers.base import Router, Routing, Slots, register_router


@register_router("soft")
class SoftRouter(Router):
    """Mixes rows into slots, and what comes out of the slots into rows.

    Source: Soft MoE, https://arxiv.org/abs/2308.00951; experts kept apart by key are ours.
    """

    initial = {"slots": "normal", "scale": 1.0}
    is_causal = False

    @dataclass(frozen=True, kw_only=True)
    class Config(Router.Config):
        """A soft mixture."""

        num_slots: int = 1
        """Slots of an expert, for each sequence, and for each document of a packed one."""
        experts: tuple[int, ...] = ()
        """Experts of each key, which mix the rows of that key alone; they sum to the bank's. All experts mix all rows
        where empty."""

        def __post_init__(self) -> None:
            super().__post_init__()
            self.check_positive("num_slots")
            if self.experts and min(self.experts) < 1:
                raise ConfigError(f"experts {self.experts} must give each key at least one expert")

        @property
        def needs_key_order(self) -> bool:
            return False

        @property
        def mixes_rows(self) -> bool:
            return True

        def experts_per_token(self, num_experts: int, modality: int) -> None:
            """Not known: what slots cost a token depends on how many share them."""

        def reached_experts(self, num_experts: int, modality: int) -> range:
            if not self.experts:
                return range(num_experts)
            first = sum(self.experts[:modality])
            return range(first, first + self.experts[modality])

        def router_params(self, hidden_size: int, num_experts: int, modality: int | None = None) -> int:
            count = num_experts if modality is None else len(self.reached_experts(num_experts, modality))
            return hidden_size * count * self.num_slots

    def __init__(self, config: SoftRouter.Config, *, hidden_size: int, num_experts: int, num_modalities: int) -> None:
        super().__init__()
        if config.experts and (len(config.experts) != num_modalities or sum(config.experts) != num_experts):
            raise ConfigError(
                f"experts {config.experts} must give each of {num_modalities} keys a number and sum to the bank's "
                f"{num_experts}"
            )
        self.config = config
        self.num_experts = num_experts
        self.slots = nn.Parameter(torch.empty(num_experts, config.num_slots, hidden_size))
        self.scale = nn.Parameter(torch.empty(()))
        nn.init.normal_(self.slots, std=0.02)
        nn.init.constant_(self.scale, 1.0)

    def forward(self, x: Tensor, rows: RowLayout) -> Routing:
        """``(N, D)`` rows; every row is routed to every expert it can reach, at its share of the slots.

        Raises:
            ValueError: where a row may not look at others, as with a cache.
        """
        if rows.routes_causally:
            raise ValueError(
                "SoftRouter mixes all rows of a sequence, which a cache does not allow; score without a cache, or take "
                "a router that generates"
            )
        with torch.autocast(x.device.type, enabled=False):
            directions = self.scale.float() * F.normalize(self.slots.float().flatten(0, 1), dim=-1)
            logits = F.linear(F.normalize(x.float(), dim=-1), directions)  # (N, E * S)
        if self.config.experts:
            # a finite number, so that a key without rows gives zeros rather than NaN
            logits = logits.masked_fill(~self._reachable(rows), torch.finfo(logits.dtype).min)
        timed = rows.to_time(logits)  # (B, T, E * S)
        if rows.valid is not None:
            is_padding = ~rows.valid.view(rows.batch_size, rows.sequence_length, 1)
            timed = timed.masked_fill(is_padding, torch.finfo(logits.dtype).min)
        return self._routing(logits, self._mixtures(timed, rows, x.dtype))

    def _mixtures(self, timed: Tensor, rows: RowLayout, dtype: torch.dtype) -> Slots:
        """``(B, T, E * S)`` logits as shares, each document of a packed sequence in slots of its own."""
        size = self.num_experts, self.config.num_slots
        combine = timed.softmax(-1)
        if rows.document_ids is None:
            return Slots(
                timed.softmax(1).to(dtype).transpose(1, 2).unflatten(1, size), combine.to(dtype).unflatten(2, size)
            )
        documents = rows.to_time(rows.document_ids)
        count = int(documents.max()) + 1 if documents.numel() else 1
        is_own = F.one_hot(documents, count).bool().unsqueeze(3)  # (B, T, G, 1)
        dispatch = timed.unsqueeze(2).masked_fill(~is_own, torch.finfo(timed.dtype).min).softmax(1).to(dtype)
        combine = torch.where(is_own, combine.unsqueeze(2), 0).to(dtype)
        return Slots(
            dispatch.unflatten(3, size).permute(0, 3, 2, 4, 1).flatten(2, 3),
            combine.unflatten(3, size).permute(0, 1, 3, 2, 4).flatten(3, 4),
        )

    def _reachable(self, rows: RowLayout) -> Tensor:
        """``(N, E * S)`` bool, the slots of the experts of each row's key."""
        keys = torch.arange(len(self.config.experts), device=rows.key_ids.device)
        owner = keys.repeat_interleave(torch.tensor(self.config.experts, device=keys.device) * self.config.num_slots)
        return owner == rows.key_ids.unsqueeze(1)

    def _routing(self, logits: Tensor, slots: Slots) -> Routing:
        """An entry for each row and expert; its weight is what the row gets of the expert's slots."""
        number, count = len(logits), self.num_experts
        by_expert = logits.unflatten(1, (count, -1)).logsumexp(-1)
        token_index = torch.arange(number, device=logits.device).repeat_interleave(count)
        expert_ids = torch.arange(count, device=logits.device).repeat(number)
        weights = by_expert.softmax(-1)
        unreachable = weights.reshape(-1) == 0
        return Routing(
            token_index,
            expert_ids.masked_fill(unreachable, -1),
            weights.reshape(-1).to(slots.combine.dtype),
            by_expert.masked_fill(by_expert <= torch.finfo(by_expert.dtype).min / 2, float("-inf")),
            slots=slots,
        )


__all__ = ["SoftRouter"]

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
from omnimoe.experts.base import Experts, check_network, register_experts
from omnimoe.layers import BankMLP, RowLayout
from omnimoe.routers import Routing


@register_experts("soft")
class SoftExperts(Experts):
    """Experts under slots.

    Source: Soft MoE, https://arxiv.org/abs/2308.00951; experts kept apart by key are ours.
    """

    initial = {"slots": "normal", "scale": 1.0}

    @dataclass(frozen=True, kw_only=True)
    class Config(Experts.Config):
        """A soft mixture of experts."""

        num_experts: int = 8
        """Experts E in the bank."""
        num_slots: int = 1
        """Slots of an expert, for each sequence."""
        intermediate_size: int = 1024
        """Width F of an expert."""
        activation: str = "silu"
        """A name of ``omnimoe.ops.ACTIVATIONS``."""
        gated: bool = True
        """Multiply by the activated gate."""
        experts: tuple[int, ...] = ()
        """Experts of each key, which mix the rows of that key alone; they sum to ``num_experts``. All experts mix all
        rows where empty."""

        def __post_init__(self) -> None:
            super().__post_init__()
            check_network(self.intermediate_size, self.activation, self.gated)
            self.check_positive("num_experts", "num_slots")
            if self.experts and (sum(self.experts) != self.num_experts or min(self.experts) < 1):
                raise ConfigError(
                    f"experts {self.experts} must give each key at least one expert and sum to {self.num_experts}"
                )

        @property
        def needs_key_order(self) -> bool:
            return False

        @property
        def is_causal(self) -> bool:
            return False

        @property
        def has_causal_form(self) -> bool:
            return False

    def __init__(self, config: SoftExperts.Config, *, hidden_size: int, num_modalities: int, layer_idx: int) -> None:
        super().__init__()
        if config.experts and len(config.experts) != num_modalities:
            raise ConfigError(f"experts {config.experts} has {len(config.experts)} entries for {num_modalities} keys")
        self.config = config
        self.num_experts = config.num_experts
        self.slots = nn.Parameter(torch.empty(config.num_experts, config.num_slots, hidden_size))
        self.scale = nn.Parameter(torch.empty(()))
        nn.init.normal_(self.slots, std=0.02)
        nn.init.constant_(self.scale, 1.0)
        self.experts = BankMLP(
            config.num_experts, hidden_size, config.intermediate_size, config.activation, config.gated
        )

    def forward(self, x: Tensor, rows: RowLayout) -> tuple[Tensor, Routing]:
        """``(N, D)`` rows to ``(N, D)``; every row is routed to every expert it can reach, at its share of the slots.

        Raises:
            ValueError: where a row may not look at others, as with a cache.
        """
        if rows.routes_causally:
            raise ValueError(
                "soft experts mix all rows of a sequence, which a cache does not allow; score without a cache, or take "
                "experts under a router that generates"
            )
        config = self.config
        with torch.autocast(x.device.type, enabled=False):
            directions = self.scale.float() * F.normalize(self.slots.float().flatten(0, 1), dim=-1)
            logits = F.linear(F.normalize(x.float(), dim=-1), directions)  # (N, E * S)
        if config.experts:
            # a finite number, so that a key without rows gives zeros rather than NaN
            logits = logits.masked_fill(~self._reachable(rows), torch.finfo(logits.dtype).min)
        timed, inputs = rows.to_time(logits), rows.to_time(x)  # (B, T, E * S), (B, T, D)
        if rows.valid is not None:
            is_padding = ~rows.valid.view(rows.batch_size, rows.sequence_length, 1)
            timed = timed.masked_fill(is_padding, torch.finfo(logits.dtype).min)
        slots = timed.softmax(1).to(x.dtype).transpose(1, 2) @ inputs  # (B, E * S, D)
        grouped = slots.unflatten(1, (config.num_experts, config.num_slots)).transpose(0, 1).flatten(0, 2)
        each = rows.batch_size * config.num_slots
        ends = torch.arange(1, config.num_experts + 1, device=x.device, dtype=torch.int32) * each
        worked = self.experts(grouped, ends).view(config.num_experts, rows.batch_size, config.num_slots, x.shape[1])
        combine = timed.softmax(-1)
        y = rows.to_rows(combine.to(x.dtype) @ worked.transpose(0, 1).flatten(1, 2))
        return y, self._routing(logits, x.dtype)

    def _reachable(self, rows: RowLayout) -> Tensor:
        """``(N, E * S)`` bool, the slots of the experts of each row's key."""
        keys = torch.arange(len(self.config.experts), device=rows.key_ids.device)
        owner = keys.repeat_interleave(torch.tensor(self.config.experts, device=keys.device) * self.config.num_slots)
        return owner == rows.key_ids.unsqueeze(1)

    def _routing(self, logits: Tensor, dtype: torch.dtype) -> Routing:
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
            weights.reshape(-1).to(dtype),
            by_expert.masked_fill(by_expert <= torch.finfo(by_expert.dtype).min / 2, float("-inf")),
        )

"""Rows on their way to experts: one routing, sorted by expert once, for every bank that stands under it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from omnimoe.layers import ExpertLinear, RowLayout
from omnimoe.ops import combine, route_plan
from omnimoe.routers import Slots


@dataclass(frozen=True)
class Sent:
    """Routed rows in the order of their experts.

    Args:
        offsets: ``(E,)`` int32, the end of each expert's rows.
        token_index: ``(R,)`` int64, the row that each is.
        weights: ``(R,)``, of what the expert gives.
        num_rows: N.
        places: ``(R,)`` int64 into N·K, where each row keeps what its experts gave it apart; None where it does not.
        most: K, the most experts of a row.
    """

    offsets: Tensor
    token_index: Tensor
    weights: Tensor
    num_rows: int
    places: Tensor | None = None
    most: int = 1

    @classmethod
    def of(
        cls,
        token_index: Tensor,
        expert_ids: Tensor,
        expert_weights: Tensor,
        rows: RowLayout,
        num_experts: int,
        most: int | None = None,
    ) -> Sent:
        """Sorts the entries of a routing.

        Args:
            token_index: ``(R,)`` int64 into the N rows.
            expert_ids: ``(R,)`` int64; -1 meets none.
            expert_weights: ``(R,)``.
            rows: their layout.
            num_experts: E.
            most: K, where what the experts of a row give is kept apart.
        """
        if rows.counted is not None:
            expert_ids = torch.where(rows.counted[token_index], expert_ids, -1)
        plan = route_plan(expert_ids, num_experts)
        places = None if most is None else _places(token_index, expert_ids, len(rows), most)[plan.order]
        return cls(plan.offsets, token_index[plan.order], expert_weights[plan.order], len(rows), places, most or 1)

    def through(self, bank: ExpertLinear, x: Tensor) -> Tensor:
        """``(N, D)`` rows to ``(N, F)``; a row that no expert takes gets zeros. See :class:`ExpertLinear`."""
        if bank.meets == "split":
            return self._split(bank.product(x, self.offsets, self.token_index), bank.num_heads)
        if bank.meets == "join":
            y = bank.product(self._apart(x, bank.num_heads), self.offsets, self.places)
        else:
            y = bank.product(x, self.offsets, self.token_index)
        return combine(y, self.token_index, self.weights, self.num_rows)

    def _split(self, y: Tensor, num_heads: int) -> Tensor:
        """``(R, H·C)`` to ``(N, H·K·C)``, zeros where a row has fewer than K experts."""
        assert self.places is not None
        width = y.shape[1]
        apart = y.new_zeros(self.num_rows * self.most, width).index_add(0, self.places, y)
        apart = apart.view(self.num_rows, self.most, num_heads, width // num_heads)
        return apart.transpose(1, 2).reshape(self.num_rows, self.most * width)

    def _apart(self, x: Tensor, num_heads: int) -> Tensor:
        """``(N, H·K·C)`` to ``(N·K, H·C)``."""
        width = x.shape[1] // self.most
        apart = x.view(self.num_rows, num_heads, self.most, width // num_heads).transpose(1, 2)
        return apart.reshape(self.num_rows * self.most, width)


def _places(token_index: Tensor, expert_ids: Tensor, num_rows: int, most: int) -> Tensor:
    """``(R,)`` int64, a place of its own for each entry among the ``most`` of its row; 0 for one without an expert."""
    taken = expert_ids >= 0
    plan = route_plan(torch.where(taken, token_index, -1), max(1, num_rows))
    first = torch.cat((plan.offsets.new_zeros(1), plan.offsets[:-1])).long()
    return torch.where(taken, token_index * most + plan.inverse - first[token_index], 0)


@dataclass(frozen=True)
class Mixed:
    """Mixtures of rows, for a router that mixes.

    Args:
        slots: the mixtures.
        rows: the layout of the rows.
    """

    slots: Slots
    rows: RowLayout

    def through(self, bank: ExpertLinear, x: Tensor) -> Tensor:
        """``(N, D)`` rows to ``(N, F)``; copies behind those that have slots are left alone."""

        def product(x: Tensor, ends: Tensor) -> Tensor:
            return bank.product(x, F.pad(ends, (0, bank.num_copies - len(ends)), value=len(x)))

        return self.slots.through(product, x, self.rows)


__all__ = ["Mixed", "Sent"]

"""Linear maps as banks."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from omnimoe.layers.bank import Bank, plain, select
from omnimoe.layers.rows import RowLayout
from omnimoe.ops import grouped_mm, linear


class BankLinear(Bank):
    """A linear map with one copy a tower.

    Args:
        towers: the copy of each key, resolved.
        in_features: D.
        out_features: F.
        bias: add a bias, one a copy.
    """

    initial = {"weight": "normal", "bias": 0.0}

    def __init__(self, towers: tuple[int, ...], in_features: int, out_features: int, bias: bool = False) -> None:
        super().__init__(towers)
        self.weight = nn.Parameter(torch.empty(self.num_copies, out_features, in_features))
        self.bias = nn.Parameter(torch.empty(self.num_copies, out_features)) if bias else None
        self.reset_parameters()

    def forward(self, x: Tensor, rows: RowLayout) -> Tensor:
        """``(N, D)`` rows to ``(N, F)``, each through the copy of its key."""
        if self.num_copies == 1:
            return linear(x, plain(self.weight).squeeze(0), None if self.bias is None else self.bias.squeeze(0))
        weight, ends = select(self.weight, self.towers, rows)
        bias = None if self.bias is None else select(self.bias, self.towers, rows)[0]
        return grouped_mm(x, weight, ends, bias)

    def extra_repr(self) -> str:
        copies, out_features, in_features = self.weight.shape
        return f"copies={copies}, in_features={in_features}, out_features={out_features}, bias={self.bias is not None}"


class ExpertLinear(BankLinear):
    """A linear map with one copy an expert; which of them a row meets, ``rows.sent`` knows.

    Args:
        num_experts: E.
        in_features: D.
        out_features: F.
        bias: add a bias, one an expert.
        meets: how a row meets K of them: ``"sum"`` adds up what they give; ``"split"`` keeps it apart, ``(N, H·K·C)``
            where ``F = H·C``; ``"join"`` takes such rows, each expert its own, and adds up.
        num_heads: H, where what experts give or get is kept apart.
    """

    def __init__(
        self,
        num_experts: int,
        in_features: int,
        out_features: int,
        bias: bool = False,
        meets: str = "sum",
        num_heads: int = 1,
    ) -> None:
        super().__init__(tuple(range(num_experts)), in_features, out_features, bias)
        self.meets, self.num_heads = meets, num_heads

    def forward(self, x: Tensor, rows: RowLayout) -> Tensor:
        """``(N, D)`` rows to ``(N, F)``, each through the experts that it was sent to."""
        first, *more = (way.through(self, x) for way in rows.sent)
        return sum(more, first)

    def product(self, x: Tensor, ends: Tensor, row_index: Tensor | None = None) -> Tensor:
        """Runs of rows through their experts; see :func:`omnimoe.ops.grouped_mm`."""
        return grouped_mm(x, plain(self.weight), ends, self.bias, row_index)


class Head(nn.Linear):
    """A linear map without copies, through our op: over a vocabulary it is much of a decoded token's time."""

    def forward(self, input: Tensor) -> Tensor:
        """``(..., D)`` to ``(..., F)``."""
        return linear(input, self.weight, self.bias)

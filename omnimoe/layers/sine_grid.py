"""Fixed positions in a square grid."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def sine_grid(side: int, width: int) -> Tensor:
    """Sines and cosines of column and row: ``(side * side, width)`` float32, cell (r, c) at ``r * side + c``.

    The first half of the channels tells the column, the second the row; in each, ``width / 4`` sines and then as many
    cosines of the position times ``10000 ** (-i / (width / 4))``.

    Raises:
        ValueError: if ``width`` is no multiple of 4.

    Source: https://arxiv.org/abs/2111.06377.
    """
    if width % 4:
        raise ValueError(f"two axes of sines and cosines need a width that 4 divides, got {width}")
    quarter = width // 4
    rate = 10_000.0 ** (-torch.arange(quarter, dtype=torch.float64) / quarter)
    angle = torch.arange(side, dtype=torch.float64).unsqueeze(1) * rate
    axis = torch.cat((angle.sin(), angle.cos()), dim=1)  # (side, width / 2)
    columns, rows = axis.repeat(side, 1), axis.repeat_interleave(side, dim=0)
    return torch.cat((columns, rows), dim=1).float()


class SineGrid(nn.Module):
    """A table of :func:`sine_grid` that is saved with the model and never trained.

    Args:
        side: cells along a side of the largest picture.
        width: D.
    """

    def __init__(self, side: int, width: int) -> None:
        super().__init__()
        self.side = side
        self.weight = nn.Parameter(torch.empty(side * side, width), requires_grad=False)
        self.reset_parameters()

    def initial_buffers(self) -> dict[str, Tensor]:
        """How the table starts, for a model that was built without memory."""
        return {"weight": sine_grid(self.side, self.weight.shape[1])}

    def reset_parameters(self, std: float = 0.0) -> None:
        """Writes the table anew."""
        with torch.no_grad():
            self.weight.copy_(self.initial_buffers()["weight"])

    def forward(self, places: Tensor) -> Tensor:
        """``(...)`` int64 places to ``(..., D)``."""
        return self.weight[places]

    def extra_repr(self) -> str:
        return f"side={self.side}, width={self.weight.shape[1]}"

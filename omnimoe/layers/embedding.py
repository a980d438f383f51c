"""Embedding tables: of models that scale what comes out of it, and of learned positions."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from omnimoe.layers.rows import RowLayout


class ScaledEmbedding(nn.Embedding):
    """A table whose rows are multiplied by a number on the way in, and not where the head shares them.

    Args:
        num_embeddings: V.
        embedding_dim: D.
        scale: the number, rounded to the dtype of the table first, as Gemma does.
    """

    def __init__(self, num_embeddings: int, embedding_dim: int, scale: float) -> None:
        super().__init__(num_embeddings, embedding_dim)
        self.scale = scale

    def forward(self, input: Tensor) -> Tensor:
        """``(...)`` ids to ``(..., D)``."""
        return super().forward(input) * torch.tensor(self.scale, dtype=self.weight.dtype)


class LearnedPositions(nn.Module):
    """A table of learned positions for each modality, added to what enters the first layer.

    Args:
        rows: of the table of each modality, 0 for none; the tables lie one after the other.
        hidden_size: D.
        offset: row of a table that position 0 meets.
    """

    initial = {"weight": "normal"}

    def __init__(self, rows: tuple[int, ...], hidden_size: int, offset: int = 0) -> None:
        super().__init__()
        self.rows = rows
        self.offset = offset
        self.weight = nn.Parameter(torch.empty(sum(rows), hidden_size))
        nn.init.normal_(self.weight, std=0.02)

    def forward(self, x: Tensor, rows: RowLayout, positions: Tensor) -> Tensor:
        """Rows with their places.

        Args:
            x: ``(N, D)``.
            rows: their layout.
            positions: ``(N,)`` int64.

        Returns:
            ``(N, D)``.

        Raises:
            ValueError: on the CPU, if a position is past its table.
        """
        sizes = torch.tensor(self.rows, device=x.device)
        size, start = sizes[rows.modality_ids], (sizes.cumsum(0) - sizes)[rows.modality_ids]
        place, placed = positions.long() + self.offset, size > 0
        if x.device.type == "cpu" and not torch.compiler.is_compiling():
            late = placed & (place >= size)
            if bool(late.any()):
                first = int(late.nonzero()[0])
                raise ValueError(
                    f"position {int(positions[first])} of modality {int(rows.modality_ids[first])} is past its table "
                    f"of {int(size[first])} learned positions, of which the first {self.offset} stand for none; "
                    "shorten the input"
                )
        index = (start + torch.where(placed, place, 0)).clamp(max=len(self.weight) - 1)
        return x + torch.where(placed.unsqueeze(1), F.embedding(index, self.weight), 0).to(x.dtype)

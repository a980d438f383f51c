"""Embedding tables: of models that scale or normalise what comes out of it, and of learned positions."""

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


class NormedEmbedding(nn.Embedding):
    """A table whose rows get a learned row added and are normalised on the way in, as BERT's words are.

    Args:
        num_embeddings: V.
        embedding_dim: D.
        eps: added to the variance.

    Source: https://arxiv.org/abs/1810.04805. A sentence there is of one of two types; here all are of the first.
    """

    initial = {"types": "normal"}

    def __init__(self, num_embeddings: int, embedding_dim: int, eps: float) -> None:
        super().__init__(num_embeddings, embedding_dim)
        self.types = nn.Parameter(torch.empty(2, embedding_dim))
        nn.init.normal_(self.types, std=0.02)
        self.norm = nn.LayerNorm(embedding_dim, eps=eps)

    def forward(self, input: Tensor) -> Tensor:
        """``(...)`` ids to ``(..., D)``."""
        return self.norm(super().forward(input) + self.types[0])


class HeadLayer(nn.Module):
    """What stands before a head over a vocabulary: a layer with its norm, as BERT has it.

    Args:
        hidden_size: D.
        eps: added to the variance.

    Source: https://arxiv.org/abs/1810.04805.
    """

    def __init__(self, hidden_size: int, eps: float) -> None:
        super().__init__()
        self.dense = nn.Linear(hidden_size, hidden_size)
        self.norm = nn.LayerNorm(hidden_size, eps=eps)

    def forward(self, x: Tensor) -> Tensor:
        """``(..., D)`` to the same."""
        return self.norm(F.gelu(self.dense(x)))


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

"""The embedding table of models that scale what comes out of it."""

from __future__ import annotations

import torch
from torch import Tensor, nn


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

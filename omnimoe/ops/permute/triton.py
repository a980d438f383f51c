"""Triton's kernel: rows that were not taken are not read."""

from __future__ import annotations

import torch
from torch import Tensor


def take(x: Tensor, index: Tensor, filled: Tensor | None) -> Tensor:
    """Rows of ``x`` by ``index (S,)``; zeros where ``filled (S,)`` is false."""
    return torch.ops.omnimoe_triton.gather_rows(x, index, filled)

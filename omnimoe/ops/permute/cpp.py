"""The compiled kernel for a CPU: rows are copied as they lie, and those that were not taken are zeroed in one go."""

from __future__ import annotations

import torch
from torch import Tensor


def take(x: Tensor, index: Tensor, filled: Tensor | None) -> Tensor:
    """Rows of ``x`` by ``index (S,)``; zeros where ``filled (S,)`` is false."""
    return torch.ops.omnimoe.gather_rows(x, index, filled)

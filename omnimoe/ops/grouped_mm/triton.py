"""Triton's kernels."""

from __future__ import annotations

import torch
from torch import Tensor


def grouped_mm(
    x: Tensor, weight: Tensor, offsets: Tensor, bias: Tensor | None = None, row_index: Tensor | None = None
) -> Tensor:
    """See :func:`omnimoe.ops.grouped_mm`; a bank whose columns lie side by side is read as it lies."""
    return torch.ops.omnimoe_triton.grouped_mm(x, weight, offsets, bias, row_index)

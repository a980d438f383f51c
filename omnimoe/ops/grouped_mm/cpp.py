"""The compiled kernels for a CPU."""

from __future__ import annotations

import torch
from torch import Tensor

from omnimoe.ops._library import call
from omnimoe.ops._spans import check_offsets


def grouped_mm(
    x: Tensor, weight: Tensor, offsets: Tensor, bias: Tensor | None = None, row_index: Tensor | None = None
) -> Tensor:
    """See :func:`omnimoe.ops.grouped_mm`; a bank whose columns lie side by side is read as it lies."""
    check_offsets(offsets, x.shape[0] if row_index is None else row_index.shape[0])
    return call(torch.ops.omnimoe.grouped_mm, x, weight, offsets, bias, row_index)

"""The definition: every row picks the matrix of its group. Any device and dtype, no synchronisation, much memory."""

from __future__ import annotations

import torch
from torch import Tensor


def grouped_mm(
    x: Tensor, weight: Tensor, offsets: Tensor, bias: Tensor | None = None, row_index: Tensor | None = None
) -> Tensor:
    """See :func:`omnimoe.ops.grouped_mm`."""
    if row_index is not None:
        x = x.index_select(0, row_index)
    group = torch.searchsorted(offsets, torch.arange(x.shape[0], device=x.device, dtype=torch.int32), right=True)
    inside = (group < weight.shape[0]).unsqueeze(1)
    group = group.clamp(max=weight.shape[0] - 1)
    # what a row past the end holds must not reach the weight's gradient, where NaN times zero would be NaN
    x = torch.where(inside, x, x.new_zeros(()))
    y = torch.einsum("rd,rfd->rf", x, weight[group])
    if bias is not None:
        y = y + bias[group]
    return torch.where(inside, y, y.new_zeros(()))

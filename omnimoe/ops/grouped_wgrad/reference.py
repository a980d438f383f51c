"""The definition: for each group a product of all rows, those of other groups being zeros. Nothing is read back."""

from __future__ import annotations

import torch
from torch import Tensor


def grouped_wgrad(
    grad: Tensor, x: Tensor, offsets: Tensor, grad_index: Tensor | None = None, x_index: Tensor | None = None
) -> Tensor:
    """See :func:`omnimoe.ops.grouped_wgrad`."""
    grad = grad if grad_index is None else grad.index_select(0, grad_index)
    x = x if x_index is None else x.index_select(0, x_index)
    row = torch.arange(x.shape[0], device=x.device, dtype=torch.int32)
    group = torch.searchsorted(offsets, row, right=True).unsqueeze(1)
    parts = []
    for number in range(offsets.shape[0]):
        # both are masked: zero times what a row of another group holds could be NaN
        left, right = (torch.where(group == number, part, part.new_zeros(())) for part in (grad, x))
        parts.append(left.t() @ right)
    return torch.stack(parts) if parts else grad.new_zeros(0, grad.shape[1], x.shape[1])

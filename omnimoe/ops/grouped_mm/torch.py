"""torch's own grouped product, for CUDA: the offsets stay on the device."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def can_handle(x: Tensor) -> bool:
    """True for the dtypes that ``torch.nn.functional.grouped_mm`` takes."""
    return x.dtype in (torch.bfloat16, torch.float16, torch.float32)


def grouped_mm(x: Tensor, weight: Tensor, offsets: Tensor, bias: Tensor | None = None) -> Tensor:
    """See :func:`omnimoe.ops.grouped_mm`."""
    row = torch.arange(x.shape[0], device=x.device, dtype=torch.int32)
    inside = (row < offsets[-1]).unsqueeze(1)
    # torch leaves rows past the last offset uninitialised, forward and backward; NaN times zero would be NaN
    x = torch.where(inside, x, x.new_zeros(()))
    y = F.grouped_mm(x, weight.transpose(1, 2), offs=offsets)
    if bias is not None:
        y = y + bias[torch.searchsorted(offsets, row, right=True).clamp(max=weight.shape[0] - 1)]
    return torch.where(inside, y, y.new_zeros(()))

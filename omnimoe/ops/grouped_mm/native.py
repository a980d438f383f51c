"""torch's own grouped product, for CUDA: the offsets stay on the device.

The file is not called ``torch``: as an attribute of its package that name would hide the library in ``__init__``.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def can_handle(x: Tensor, weight: Tensor) -> bool:
    """True for the dtypes and widths that ``torch.nn.functional.grouped_mm`` takes: rows of whole 16 bytes."""
    widths = weight.shape[1:]
    return x.dtype in (torch.bfloat16, torch.float16, torch.float32) and not any(
        width * x.element_size() % 16 for width in widths
    )


def grouped_mm(x: Tensor, weight: Tensor, offsets: Tensor, bias: Tensor | None = None) -> Tensor:
    """See :func:`omnimoe.ops.grouped_mm`."""
    row = torch.arange(x.shape[0], device=x.device, dtype=torch.int32)
    inside = (row < offsets[-1]).unsqueeze(1)
    # torch leaves rows past the last offset uninitialised, forward and backward; NaN times zero would be NaN
    x = torch.where(inside, x, x.new_zeros(()))
    y = F.grouped_mm(x, weight.contiguous().transpose(1, 2), offs=offsets)
    if bias is not None:
        y = y + bias[torch.searchsorted(offsets, row, right=True).clamp(max=weight.shape[0] - 1)]
    return torch.where(inside, y, y.new_zeros(()))

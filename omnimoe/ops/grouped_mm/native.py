"""torch's own grouped product, for CUDA: the offsets stay on the device.

The file is not called ``torch``: as an attribute of its package that name would hide the library in ``__init__``.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def why_not(x: Tensor, weight: Tensor) -> str:
    """Why ``torch.nn.functional.grouped_mm`` cannot: it takes three dtypes, and rows of whole 16 bytes."""
    if x.dtype not in (torch.bfloat16, torch.float16, torch.float32):
        return f"it takes bfloat16, float16 and float32, not {x.dtype}"
    odd = [width for width in weight.shape[1:] if width * x.element_size() % 16]
    return f"rows of {odd[0]} elements are no multiple of 16 bytes" if odd else ""


def is_one_kernel(x: Tensor) -> bool:
    """Whether PyTorch multiplies all groups at once, without reading the offsets; of no meaning but on CUDA."""
    return x.device.type != "cuda" or (x.dtype == torch.bfloat16 and _capability(x.device.index or 0) in (9, 10))


@torch.compiler.assume_constant_result
def _capability(index: int) -> int:
    return torch.cuda.get_device_capability(index)[0] if torch.cuda.is_available() else 0


def grouped_mm(x: Tensor, weight: Tensor, offsets: Tensor, bias: Tensor | None = None) -> Tensor:
    """See :func:`omnimoe.ops.grouped_mm`."""
    row = torch.arange(x.shape[0], device=x.device, dtype=torch.int32)
    inside = (row < offsets[-1]).unsqueeze(1)
    # torch leaves rows past the last offset uninitialised, forward and backward; NaN times zero would be NaN
    x = torch.where(inside, x, x.new_zeros(()))
    matrices = weight.transpose(1, 2)
    y = F.grouped_mm(x, matrices if matrices.is_contiguous() else weight.contiguous().transpose(1, 2), offs=offsets)
    if bias is not None:
        y = y + bias[torch.searchsorted(offsets, row, right=True).clamp(max=weight.shape[0] - 1)]
    return torch.where(inside, y, y.new_zeros(()))

"""The compiled kernels for a CPU."""

from __future__ import annotations

import torch
from torch import Tensor

from omnimoe.ops._spans import check_offsets


def grouped_mm(x: Tensor, weight: Tensor, offsets: Tensor, bias: Tensor | None = None) -> Tensor:
    """See :func:`omnimoe.ops.grouped_mm`."""
    check_offsets(offsets, x.shape[0])
    return torch.ops.omnimoe.grouped_mm(x, weight, offsets, bias)

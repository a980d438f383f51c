"""The compiled kernels for a CPU: a bank of one copy."""

from __future__ import annotations

import torch
from torch import Tensor

from omnimoe.ops._library import call


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """See :func:`omnimoe.ops.linear`."""
    rows, bank = x.reshape(-1, x.shape[-1]), None if bias is None else bias.unsqueeze(0)
    ends = torch.full((1,), len(rows), dtype=torch.int32)
    y = call(torch.ops.omnimoe.grouped_mm, rows, weight.unsqueeze(0), ends, bank)
    return y.view(*x.shape[:-1], len(weight))

"""The compiled kernel for a CPU: channels side by side, states in the nearest cache, decays never written out."""

from __future__ import annotations

import torch
from torch import Tensor

from omnimoe.ops._library import call


def selective_scan(
    x: Tensor, step: Tensor, rate: Tensor, into: Tensor, out: Tensor, state: Tensor | None, starts: Tensor | None
) -> tuple[Tensor, Tensor]:
    """See :func:`omnimoe.ops.selective_scan`; operands of one dtype, float32 or float64."""
    y, last, _ = call(torch.ops.omnimoe.selective_scan, x, step, rate, into, out, state, starts)
    return y, last

"""Triton's kernel."""

from __future__ import annotations

import torch
from torch import Tensor


def grouped_wgrad(
    grad: Tensor, x: Tensor, offsets: Tensor, grad_index: Tensor | None = None, x_index: Tensor | None = None
) -> Tensor:
    """See :func:`omnimoe.ops.grouped_wgrad`."""
    return torch.ops.omnimoe_triton.grouped_wgrad(grad, x, offsets, grad_index, x_index)

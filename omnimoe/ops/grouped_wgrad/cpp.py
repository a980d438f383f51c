"""The compiled kernels for a CPU."""

from __future__ import annotations

import torch
from torch import Tensor

from omnimoe.ops._spans import check_offsets


def grouped_wgrad(
    grad: Tensor, x: Tensor, offsets: Tensor, grad_index: Tensor | None = None, x_index: Tensor | None = None
) -> Tensor:
    """See :func:`omnimoe.ops.grouped_wgrad`."""
    check_offsets(offsets, x.shape[0] if x_index is None else x_index.shape[0])
    return torch.ops.omnimoe.grouped_wgrad(grad, x, offsets, grad_index, x_index)

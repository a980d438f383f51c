"""One matrix product a group, for a CPU, where slices are free."""

from __future__ import annotations

import torch
from torch import Tensor

from omnimoe.ops._rows import take_rows
from omnimoe.ops._spans import spans


def grouped_wgrad(
    grad: Tensor, x: Tensor, offsets: Tensor, grad_index: Tensor | None = None, x_index: Tensor | None = None
) -> Tensor:
    """See :func:`omnimoe.ops.grouped_wgrad`."""
    grad = grad if grad_index is None else take_rows(grad, grad_index)
    x = x if x_index is None else take_rows(x, x_index)
    parts = list(x.new_zeros(offsets.shape[0], grad.shape[1], x.shape[1]).unbind())
    for group, start, stop in spans(offsets, x.shape[0]):
        parts[group] = grad[start:stop].t() @ x[start:stop]
    return torch.stack(parts)

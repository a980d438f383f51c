"""One matrix product a group, written into one output: for a CPU, where slices are free and a launch costs nothing."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from omnimoe.ops._spans import spans


def grouped_mm(x: Tensor, weight: Tensor, offsets: Tensor, bias: Tensor | None = None) -> Tensor:
    """See :func:`omnimoe.ops.grouped_mm`."""
    y = _GroupedMM.apply(x, weight, offsets)
    if bias is not None:
        stop, parts = 0, []
        for group, start, stop in spans(offsets, x.shape[0]):
            parts.append(y[start:stop] + bias[group])
        parts.append(y[stop:])
        # an absent group still takes part: its gradient is zero, not missing
        y = torch.cat(parts) + 0 * bias.sum()
    return y


class _GroupedMM(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight, offsets)
        y = x.new_empty(x.shape[0], weight.shape[1])
        stop = 0
        for group, start, stop in spans(offsets, x.shape[0]):
            torch.mm(x[start:stop], weight[group].t(), out=y[start:stop])
        y[stop:].zero_()
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        x, weight, offsets = ctx.saved_tensors
        groups = spans(offsets, x.shape[0])
        grad_x = grad_weight = None
        if ctx.needs_input_grad[0]:
            grad_x, stop = torch.empty_like(x), 0
            for group, start, stop in groups:
                torch.mm(grad[start:stop], weight[group], out=grad_x[start:stop])
            grad_x[stop:].zero_()
        if ctx.needs_input_grad[1]:
            grad_weight = torch.empty_like(weight)
            absent = set(range(weight.shape[0])) - {group for group, _, _ in groups}
            for group, start, stop in groups:
                torch.mm(grad[start:stop].t(), x[start:stop], out=grad_weight[group])
            for group in absent:
                grad_weight[group].zero_()
        return grad_x, grad_weight, None

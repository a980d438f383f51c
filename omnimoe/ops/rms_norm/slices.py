"""One slice a group; keeps the input and one number a row for backward."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from omnimoe.ops._spans import spans


def rms_norm(x: Tensor, weight: Tensor, offsets: Tensor | None, eps: float) -> Tensor:
    """See :func:`omnimoe.ops.rms_norm`."""
    return _RMSNorm.apply(x, weight, offsets, eps)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, offsets: Tensor | None, eps: float) -> Tensor:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        inverse = torch.linalg.vector_norm(wide, dim=-1, keepdim=True).square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, inverse)
        ctx.groups = spans(offsets, x.shape[0]) if offsets is not None else [(0, 0, x.shape[0])]
        y = (wide * inverse).to(x.dtype)
        scale, stop = weight.to(x.dtype), 0
        for group, start, stop in ctx.groups:
            y[start:stop].mul_(scale[group])
        y[stop:].zero_()
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        x, weight, inverse = ctx.saved_tensors
        normal = x.to(inverse.dtype) * inverse
        grad_normal = torch.empty_like(normal)
        grad_weight = torch.zeros_like(weight)
        stop = 0
        for group, start, stop in ctx.groups:
            part, wide = normal[start:stop], grad[start:stop].to(inverse.dtype)
            torch.mul(wide, weight[group], out=grad_normal[start:stop])
            grad_weight[group] = (wide * part).flatten(0, -2).sum(0)
        grad_normal[stop:].zero_()
        along = (grad_normal * normal).mean(-1, keepdim=True)
        grad_x = grad_normal.sub_(normal.mul_(along)).mul_(inverse)
        return grad_x.to(x.dtype), grad_weight, None, None

"""Shapes and gradients of the compiled ops, whose schemas are in ``csrc/library.cpp``.

:func:`register` is called once, when the library has been loaded. A second derivative is not offered: the reference
implementations have one.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

OPS = torch.ops.omnimoe


def _grouped_mm_shape(x, weight, offsets, bias=None, row_index=None, transposed=False):
    rows = x.shape[0] if row_index is None else row_index.shape[0]
    return x.new_empty(rows, weight.shape[2 if transposed else 1])


def _grouped_wgrad_shape(grad, x, offsets, grad_index=None, x_index=None):
    return x.new_empty(offsets.shape[0], grad.shape[1], x.shape[1])


def _experts_mlp_shape(x, w_in, w_out, offsets, token_index, weights, activation, keep):
    rows = x.shape[0] if token_index is None else token_index.shape[0]
    return x.new_empty(x.shape), x.new_empty(rows if keep else 0, w_in.shape[1])


def _experts_mlp_backward_shape(grad, x, z, w_in, w_out, offsets, token_index, weights, activation):
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    rows = 0 if weights is None else z.shape[0]
    return (
        x.new_empty(x.shape),
        w_in.new_empty(w_in.shape),
        w_out.new_empty(w_out.shape),
        x.new_empty(rows, dtype=dtype),
    )


def _keep_grouped_mm(ctx: Any, inputs: tuple, output: Tensor) -> None:
    x, weight, offsets, bias, row_index, transposed = inputs
    ctx.has_bias, ctx.transposed = bias is not None, transposed
    ctx.save_for_backward(x, weight, offsets, row_index)


def _grouped_mm_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, offsets, row_index = ctx.saved_tensors
    grad_x = grad_weight = grad_bias = None
    if ctx.needs_input_grad[0]:
        grad_x = OPS.grouped_mm(grad, weight, offsets, None, None, not ctx.transposed)
        if row_index is not None:
            grad_x = torch.zeros_like(x).index_add(0, row_index, grad_x)
    if ctx.needs_input_grad[1]:
        if ctx.transposed:
            grad_weight = OPS.grouped_wgrad(x, grad, offsets, row_index, None)
        else:
            grad_weight = OPS.grouped_wgrad(grad, x, offsets, None, row_index)
    if ctx.has_bias and ctx.needs_input_grad[3]:
        grad_bias = OPS.grouped_wgrad(grad, grad.new_ones(grad.shape[0], 1), offsets, None, None).squeeze(2)
    return grad_x, grad_weight, None, grad_bias, None, None


def _keep_experts_mlp(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    x, w_in, w_out, offsets, token_index, weights, activation, keep = inputs
    if keep:
        ctx.activation = activation
        ctx.save_for_backward(x, output[1], w_in, w_out, offsets, token_index, weights)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _experts_mlp_backward(ctx: Any, grad: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 8
    saved = ctx.saved_tensors
    if not saved:
        raise RuntimeError("experts_mlp kept no pre-activations; call it with keep=True where gradients are wanted")
    x, z, w_in, w_out, offsets, token_index, weights = saved
    found = OPS.experts_mlp_backward(grad, x, z, w_in, w_out, offsets, token_index, weights, ctx.activation)
    grad_x, grad_in, grad_out, grad_weights = found
    return grad_x, grad_in, grad_out, None, None, None if weights is None else grad_weights, None, None


@functools.cache
def register() -> None:
    """Tells PyTorch the shapes and gradients of the ops."""
    shapes = {
        "grouped_mm": _grouped_mm_shape,
        "grouped_wgrad": _grouped_wgrad_shape,
        "experts_mlp": _experts_mlp_shape,
        "experts_mlp_backward": _experts_mlp_backward_shape,
    }
    for name, shape in shapes.items():
        torch.library.register_fake(f"omnimoe::{name}")(shape)
    gradient = torch.library.register_autograd
    gradient("omnimoe::grouped_mm", _grouped_mm_backward, setup_context=_keep_grouped_mm)
    gradient("omnimoe::experts_mlp", _experts_mlp_backward, setup_context=_keep_experts_mlp)

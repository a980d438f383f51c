"""The compiled ops: schemas, shapes and gradients. Their kernels are in two libraries, one for CPUs and one for CUDA.

Either library may be missing, so nothing of the ops is defined there: a library only adds kernels for its device. A
second derivative is offered of the products and the sums; of ``experts_mlp`` the reference implementation has one.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
from torch import Tensor

SCHEMAS = (
    # Rows in group order times the matrix of their group: x (R, D) and weight (G, F, D), or (G, D, F) where
    # transposed. With row_index, output row r is made of row row_index[r] of x. Rows past the last offset are zeros.
    "grouped_mm(Tensor x, Tensor weight, Tensor offsets, Tensor? bias=None, Tensor? row_index=None, "
    "bool transposed=False) -> Tensor",
    # The gradient of a bank: grad (R, F) and x (R, D), or rows of either by index, to (G, F, D).
    "grouped_wgrad(Tensor grad, Tensor x, Tensor offsets, Tensor? grad_index=None, Tensor? x_index=None) -> Tensor",
    # Stable counting sort of (R,) int64 ids: the ends of the groups (G,) int32; order (R,) int64, the entry that each
    # sorted row is; and its inverse. Ids below 0 or from G on come last, past the last end.
    "route_plan(Tensor expert_ids, int num_groups) -> (Tensor offsets, Tensor order, Tensor inverse)",
    # Rows of x (R, ...) by index (S,); zeros where filled (S,) is false.
    "gather_rows(Tensor x, Tensor index, Tensor? filled) -> Tensor",
    # out[t] = sum of weights[order[i]] * y[order[i]] over offsets[t-1] <= i < offsets[t], in this order, in float32
    # (float64 for it), rounded once. order is a permutation of the rows; weights (R,) are float32, or float64.
    "sum_rows(Tensor y, Tensor offsets, Tensor order, Tensor? weights) -> Tensor",
    # The network of each group over rows x[token_index], summed by token with weights; and, where kept, the
    # pre-activations z (R, 2F or F), with the bias and in the order of w_in's rows. w_in is (G, 2F, D), the gate's rows
    # first or, interleaved, every other one; w_out (G, D, F); weights are float32, or float64 for it.
    "experts_mlp(Tensor x, Tensor w_in, Tensor w_out, Tensor offsets, Tensor? token_index, Tensor? weights, "
    "Tensor? b_in, Tensor? b_out, int activation, bool interleaved, bool keep) -> (Tensor, Tensor)",
    # The gradients of x, w_in, w_out, weights, b_in and b_out; the last three are (0,) for what is not there.
    "experts_mlp_backward(Tensor grad, Tensor x, Tensor z, Tensor w_in, Tensor w_out, Tensor offsets, "
    "Tensor? token_index, Tensor? weights, Tensor? b_in, Tensor? b_out, int activation, bool interleaved) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)
"""Of the ops that every library has kernels for."""

CPU_SCHEMAS = (
    # x (R, ..., D) times 1 / sqrt(mean(x^2) + eps), which comes out too, rounded, times the weight (G, D) of the row's
    # group, float32 (float64 for it); rows past the last offset are zeros. Without offsets G is 1.
    "rms_norm(Tensor x, Tensor weight, Tensor? offsets, float eps) -> (Tensor, Tensor)",
    "rms_norm_backward(Tensor grad, Tensor x, Tensor weight, Tensor inverse, Tensor? offsets) -> (Tensor, Tensor)",
    # Pairs (i, i + C/2) of x (N, H, C) turned by the angles of the row; tables (N, C/2) float32, or float64 for it.
    "rope(Tensor x, Tensor cos, Tensor sin) -> Tensor",
    # softmax(scale * query @ key^T) @ value for query (B, H, Q, C), key (B, G, K, C) and value (B, G, K, D), to
    # (B, Q, H, D); G divides H. A mask (B or 1, 1, Q, K) is true where a query sees a key; causal, the last query is at
    # the last key. A query that sees no key gives zeros. And, where kept, the logarithms of what shares are divided by,
    # (B, H, Q) float32, or float64 for it, of the scaled scores.
    "attend(Tensor query, Tensor key, Tensor value, Tensor? mask, float scale, bool causal, bool keep) "
    "-> (Tensor, Tensor)",
    # The gradients of query (B, Q, H, C), key (B, K, G, C) and value (B, K, G, D): positions before heads, as in out.
    "attend_backward(Tensor grad, Tensor query, Tensor key, Tensor value, Tensor out, Tensor log_sums, Tensor? mask, "
    "float scale, bool causal) -> (Tensor, Tensor, Tensor)",
    # The scan of omnimoe.ops.selective_scan, of float32 or float64: y (B, T, I), the last state (B, I, S) and the state
    # before each chunk of positions, (chunks, B, I, S).
    "selective_scan(Tensor x, Tensor step, Tensor rate, Tensor into, Tensor out, Tensor? state, Tensor? starts) "
    "-> (Tensor, Tensor, Tensor)",
    # The gradients of x, step, rate (B, I, S), into and out (groups of channels, B, T, S) and state; those of rate,
    # into and out are still to be summed over their first dimension.
    "selective_scan_backward(Tensor grad, Tensor grad_last, Tensor x, Tensor step, Tensor rate, Tensor into, "
    "Tensor out, Tensor? starts, Tensor kept) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)
"""Of those that only the library for CPUs has kernels for."""
SCAN_CHUNK, SCAN_CHANNELS = 32, 256
"""Positions between states that the scan keeps, and channels whose gradients it sums at once; as csrc/cpu/kernels.h."""


def _grouped_mm_shape(x, weight, offsets, bias=None, row_index=None, transposed=False):
    rows = x.shape[0] if row_index is None else row_index.shape[0]
    return x.new_empty(rows, weight.shape[2 if transposed else 1])


def _grouped_wgrad_shape(grad, x, offsets, grad_index=None, x_index=None):
    return x.new_empty(offsets.shape[0], grad.shape[1], x.shape[1])


def _route_plan_shape(expert_ids, num_groups):
    return (
        expert_ids.new_empty(num_groups, dtype=torch.int32),
        expert_ids.new_empty(expert_ids.shape),
        expert_ids.new_empty(expert_ids.shape),
    )


def _gather_rows_shape(x, index, filled):
    return x.new_empty(index.shape[0], *x.shape[1:])


def _sum_rows_shape(y, offsets, order, weights):
    return y.new_empty(offsets.shape[0], y.shape[1])


def _experts_mlp_shape(x, w_in, w_out, offsets, token_index, weights, b_in, b_out, activation, interleaved, keep):
    rows = x.shape[0] if token_index is None else token_index.shape[0]
    return x.new_empty(x.shape), x.new_empty(rows if keep else 0, w_in.shape[1])


def _experts_mlp_backward_shape(
    grad, x, z, w_in, w_out, offsets, token_index, weights, b_in, b_out, activation, interleaved
):
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    return (
        x.new_empty(x.shape),
        w_in.new_empty(w_in.shape),
        w_out.new_empty(w_out.shape),
        x.new_empty(0 if weights is None else z.shape[0], dtype=wide),
        x.new_empty(0 if b_in is None else b_in.shape),
        x.new_empty(0 if b_out is None else b_out.shape),
    )


def _rms_norm_shape(x, weight, offsets, eps):
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    return x.new_empty(x.shape), x.new_empty(x.shape[0], math.prod(x.shape[1:-1]), dtype=wide)


def _rms_norm_backward_shape(grad, x, weight, inverse, offsets):
    return x.new_empty(x.shape), weight.new_empty(weight.shape)


def _rope_shape(x, cos, sin):
    return x.new_empty(x.shape)


def _attend_shape(query, key, value, mask, scale, causal, keep):
    batch_size, num_heads, length, _ = query.shape
    wide = torch.float64 if query.dtype == torch.float64 else torch.float32
    out = query.new_empty(batch_size, length, num_heads, value.shape[3])
    return out, query.new_empty(batch_size if keep else 0, num_heads, length, dtype=wide)


def _attend_backward_shape(grad, query, key, value, out, log_sums, mask, scale, causal):
    return tuple(part.transpose(1, 2).new_empty(part.transpose(1, 2).shape) for part in (query, key, value))


def _selective_scan_shape(x, step, rate, into, out, state, starts):
    shape = (x.shape[0], *rate.shape)
    chunks = (x.shape[1] + SCAN_CHUNK - 1) // SCAN_CHUNK
    return x.new_empty(x.shape), x.new_empty(shape), x.new_empty(chunks, *shape)


def _selective_scan_backward_shape(grad, grad_last, x, step, rate, into, out, starts, kept):
    groups = (x.shape[2] + SCAN_CHANNELS - 1) // SCAN_CHANNELS
    state, written = (x.shape[0], *rate.shape), (groups, *into.shape)
    shapes = (x.shape, x.shape, state, written, written, state)
    return tuple(x.new_empty(shape) for shape in shapes)


def _add_back(ops: Any, grad: Tensor, index: Tensor, rows: int) -> Tensor:
    """Adds row i of ``grad`` to row ``index[i]`` of so many, in a fixed order; a negative index leaves it out."""
    offsets, order, _ = ops.route_plan(index, rows)
    return ops.sum_rows(grad, offsets, order, None)


def _keep_grouped_mm(ctx: Any, inputs: tuple, output: Tensor) -> None:
    x, weight, offsets, bias, row_index, transposed = inputs
    ctx.has_bias, ctx.transposed = bias is not None, transposed
    ctx.save_for_backward(x, weight, offsets, row_index)


def _grouped_mm_backward(ops: Any, ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, offsets, row_index = ctx.saved_tensors
    grad_x = grad_weight = grad_bias = None
    if ctx.needs_input_grad[0]:
        grad_x = ops.grouped_mm(grad, weight, offsets, None, None, not ctx.transposed)
        if row_index is not None:
            grad_x = _add_back(ops, grad_x, row_index, x.shape[0])
    if ctx.needs_input_grad[1]:
        if ctx.transposed:
            grad_weight = ops.grouped_wgrad(x, grad, offsets, row_index, None)
        else:
            grad_weight = ops.grouped_wgrad(grad, x, offsets, None, row_index)
    if ctx.has_bias and ctx.needs_input_grad[3]:
        grad_bias = ops.grouped_wgrad(grad, grad.new_ones(grad.shape[0], 1), offsets, None, None).squeeze(2)
    return grad_x, grad_weight, None, grad_bias, None, None


def _keep_grouped_wgrad(ctx: Any, inputs: tuple, output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _grouped_wgrad_backward(ops: Any, ctx: Any, grad_weight: Tensor) -> tuple[Tensor | None, ...]:
    grad, x, offsets, grad_index, x_index = ctx.saved_tensors
    grad_grad = grad_x = None
    if ctx.needs_input_grad[0]:
        grad_grad = ops.grouped_mm(x, grad_weight, offsets, None, x_index, False)
        if grad_index is not None:
            grad_grad = _add_back(ops, grad_grad, grad_index, grad.shape[0])
    if ctx.needs_input_grad[1]:
        grad_x = ops.grouped_mm(grad, grad_weight, offsets, None, grad_index, True)
        if x_index is not None:
            grad_x = _add_back(ops, grad_x, x_index, x.shape[0])
    return grad_grad, grad_x, None, None, None


def _keep_gather_rows(ctx: Any, inputs: tuple, output: Tensor) -> None:
    x, index, filled = inputs
    ctx.shape = x.shape
    ctx.save_for_backward(index, filled)


def _gather_rows_backward(ops: Any, ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    index, filled = ctx.saved_tensors
    index = index if filled is None else torch.where(filled, index, -1)
    flat = grad.reshape(grad.shape[0], math.prod(ctx.shape[1:]))
    return _add_back(ops, flat, index, ctx.shape[0]).reshape(ctx.shape), None, None


def _keep_sum_rows(ctx: Any, inputs: tuple, output: Tensor) -> None:
    y, offsets, order, weights = inputs
    # y is read for the gradient of weights alone
    wanted = weights is not None and ctx.needs_input_grad[3]
    ctx.save_for_backward(y if wanted else None, offsets, order, weights)


def _sum_rows_backward(ops: Any, ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    y, offsets, order, weights = ctx.saved_tensors
    place = torch.arange(order.shape[0], device=order.device, dtype=torch.int32)
    target = torch.empty_like(order).index_copy(0, order, torch.searchsorted(offsets, place, right=True))
    inside = target < offsets.shape[0]
    spread = ops.gather_rows(grad, torch.where(inside, target, 0), inside)  # (R, D)
    wide = torch.promote_types(grad.dtype, torch.float32)
    grad_y = grad_weights = None
    if ctx.needs_input_grad[0]:
        grad_y = spread if weights is None else (spread.to(wide) * weights.unsqueeze(1)).to(grad.dtype)
    if y is not None:
        grad_weights = (spread.to(wide) * y.to(wide)).sum(1)
    return grad_y, None, None, grad_weights


def _keep_experts_mlp(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    x, w_in, w_out, offsets, token_index, weights, b_in, b_out, ctx.activation, ctx.interleaved, keep = inputs
    z = output[1] if keep else None
    ctx.save_for_backward(x, z, w_in, w_out, offsets, token_index, weights, b_in, b_out)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _experts_mlp_backward(ops: Any, ctx: Any, grad: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 11
    x, z, w_in, w_out, offsets, token_index, weights, b_in, b_out = ctx.saved_tensors
    if z is None:  # not kept: made again, by the product that made it
        z = ops.grouped_mm(x, w_in, offsets, b_in, token_index)
    rest = (token_index, weights, b_in, b_out, ctx.activation, ctx.interleaved)
    grad_x, grad_in, grad_out, *others = ops.experts_mlp_backward(grad, x, z, w_in, w_out, offsets, *rest)
    optional = (None if part is None else found for part, found in zip((weights, b_in, b_out), others, strict=True))
    return grad_x, grad_in, grad_out, None, None, *optional, None, None, None


def _keep_rms_norm(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    x, weight, offsets, _ = inputs
    ctx.save_for_backward(x, weight, output[1], offsets)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _rms_norm_backward(ops: Any, ctx: Any, grad: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 4
    return *ops.rms_norm_backward(grad, *ctx.saved_tensors), None, None


def _keep_rope(ctx: Any, inputs: tuple, output: Tensor) -> None:
    _, cos, sin = inputs
    ctx.save_for_backward(cos, sin)


def _rope_backward(ops: Any, ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    cos, sin = ctx.saved_tensors
    return ops.rope(grad, cos, -sin), None, None


def _keep_attend(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    query, key, value, mask, ctx.scale, ctx.causal, keep = inputs
    if not keep:
        raise RuntimeError("attend has a gradient only of what it kept; pass keep=True")
    ctx.save_for_backward(query, key, value, *output, mask)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _attend_backward(ops: Any, ctx: Any, grad: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 7
    found = ops.attend_backward(grad, *ctx.saved_tensors, ctx.scale, ctx.causal)
    return *(part.transpose(1, 2) for part in found), None, None, None, None


def _keep_selective_scan(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor, Tensor]) -> None:
    x, step, rate, into, out, state, starts = inputs
    ctx.has_state = state is not None
    ctx.mark_non_differentiable(output[2])
    ctx.save_for_backward(x, step, rate, into, out, starts, output[2])


def _selective_scan_backward(ops: Any, ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
    found = ops.selective_scan_backward(grads[0], grads[1], *ctx.saved_tensors)
    grad_x, grad_step, *partial, grad_state = found
    return grad_x, grad_step, *(part.sum(0) for part in partial), grad_state if ctx.has_state else None, None


_SHAPES: dict[str, Any] = {
    "grouped_mm": _grouped_mm_shape,
    "grouped_wgrad": _grouped_wgrad_shape,
    "route_plan": _route_plan_shape,
    "gather_rows": _gather_rows_shape,
    "sum_rows": _sum_rows_shape,
    "experts_mlp": _experts_mlp_shape,
    "experts_mlp_backward": _experts_mlp_backward_shape,
    "rms_norm": _rms_norm_shape,
    "rms_norm_backward": _rms_norm_backward_shape,
    "rope": _rope_shape,
    "attend": _attend_shape,
    "attend_backward": _attend_backward_shape,
    "selective_scan": _selective_scan_shape,
    "selective_scan_backward": _selective_scan_backward_shape,
}
_GRADIENTS: dict[str, tuple[Any, Any]] = {
    "grouped_mm": (_keep_grouped_mm, _grouped_mm_backward),
    "grouped_wgrad": (_keep_grouped_wgrad, _grouped_wgrad_backward),
    "gather_rows": (_keep_gather_rows, _gather_rows_backward),
    "sum_rows": (_keep_sum_rows, _sum_rows_backward),
    "experts_mlp": (_keep_experts_mlp, _experts_mlp_backward),
    "rms_norm": (_keep_rms_norm, _rms_norm_backward),
    "rope": (_keep_rope, _rope_backward),
    "attend": (_keep_attend, _attend_backward),
    "selective_scan": (_keep_selective_scan, _selective_scan_backward),
}


@functools.cache
def register(namespace: str = "omnimoe") -> torch.library.Library:
    """Defines the ops, and tells PyTorch their shapes and gradients; once in a process, before a library is used.

    Args:
        namespace: of the ops. Kernels that are for the same device as others have one of their own.
    """
    library = torch.library.Library(namespace, "DEF")
    ops = getattr(torch.ops, namespace)
    for schema in SCHEMAS if namespace != "omnimoe" else (*SCHEMAS, *CPU_SCHEMAS):
        library.define(schema)
        name = schema.partition("(")[0]
        torch.library.register_fake(f"{namespace}::{name}", _SHAPES[name], lib=library)
        if name in _GRADIENTS:
            keep, backward = _GRADIENTS[name]
            rule = functools.partial(backward, ops)
            torch.library.register_autograd(f"{namespace}::{name}", rule, setup_context=keep, lib=library)
    return library  # which undoes everything when it is freed


def call(op: Any, *operands: Any) -> Any:
    """An op of ours; under ``no_grad`` without the step through autograd, which takes longer than a small kernel."""
    if torch.is_grad_enabled() or torch.compiler.is_compiling():
        return op(*operands)
    with torch._C._AutoDispatchBelowAutograd():
        return op(*operands)

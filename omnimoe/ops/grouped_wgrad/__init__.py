"""The gradient of a bank: the product that sums over the rows of a group."""

from __future__ import annotations

import torch
from torch import Tensor

from omnimoe.ops._backends import Implementation, choose, why_not_compiled, why_not_cuda
from omnimoe.ops.grouped_wgrad import cpp, cuda, reference, slices, triton
from omnimoe.ops.triton import why_not_triton


def grouped_wgrad(
    grad: Tensor, x: Tensor, offsets: Tensor, grad_index: Tensor | None = None, x_index: Tensor | None = None
) -> Tensor:
    """Sums ``grad[r] x[r]^T`` over the rows of each group: the gradient of the ``weight`` of ``grouped_mm``.

    Args:
        grad: ``(R, F)`` floating point, rows in group order; with ``grad_index`` ``(T, F)``.
        x: ``(R, D)`` in the dtype of ``grad``; with ``x_index`` ``(T, D)``.
        offsets: ``(G,)`` int32, the end of each group's rows, not decreasing, at most ``R``.
        grad_index: ``(R,)`` int64, the row of ``grad`` that each row in group order is.
        x_index: ``(R,)`` int64, the same of ``x``.

    Returns:
        ``(G, F, D)`` in the dtype of ``grad`` (under autocast, of autocast); zeros for a group without rows. Sums are
        taken in float32, or in float64 for it. Rows past the last offset take no part, whatever they hold.

    Raises:
        ValueError: if the operands do not have as many rows, their dtypes differ, or ``offsets`` is not int32; on the
            CPU also if it decreases or ends beyond ``R``.

    Example:
        >>> grad, x = torch.tensor([[1.0], [2.0]]), torch.tensor([[1.0, 3.0], [1.0, 4.0]])
        >>> grouped_wgrad(grad, x, torch.tensor([2, 2], dtype=torch.int32)).tolist()
        [[[3.0, 11.0]], [[0.0, 0.0]]]
    """
    rows = [len(part if index is None else index) for part, index in ((grad, grad_index), (x, x_index))]
    if grad.ndim != 2 or x.ndim != 2 or rows[0] != rows[1]:
        raise ValueError(
            f"grad must be (R, F) and x (R, D), got {tuple(grad.shape)} and {tuple(x.shape)} for {rows} rows"
        )
    if offsets.dtype != torch.int32 or offsets.ndim != 1:
        raise ValueError(f"offsets must be (G,) int32, one end a group, got {tuple(offsets.shape)} {offsets.dtype}")
    kind = x.device.type
    if torch.is_autocast_enabled(kind):
        dtype = torch.get_autocast_dtype(kind)
        grad, x = grad.to(dtype), x.to(dtype)
    if grad.dtype != x.dtype:
        raise ValueError(f"grad and x must share a dtype, got {grad.dtype} and {x.dtype}; cast one of them")
    operands = grad, x, offsets, grad_index, x_index
    return choose("grouped_wgrad", IMPLEMENTATIONS, *operands)(*operands)


def _why_not_slices(grad: Tensor, *rest: Tensor | None) -> str:
    if grad.device.type != "cpu":
        return f"grad is on {grad.device}"
    if torch.compiler.is_compiling():
        return "its slices are read from the offsets, which a traced graph cannot do"
    return ""


IMPLEMENTATIONS = (
    Implementation("cpp", cpp.grouped_wgrad, why_not_compiled),
    Implementation("cuda", cuda.grouped_wgrad, why_not_cuda),
    Implementation("triton", triton.grouped_wgrad, why_not_triton),
    Implementation("torch", slices.grouped_wgrad, _why_not_slices),
    Implementation("reference", reference.grouped_wgrad),
)

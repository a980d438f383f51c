"""Row gather whose gradient is a gather too."""

from __future__ import annotations

import torch
from torch import Tensor

from omnimoe.ops._backends import Implementation, choose, why_not_compiled, why_not_cuda
from omnimoe.ops.permute import cpp, cuda, reference, triton
from omnimoe.ops.triton import why_not_triton


def permute(x: Tensor, index: Tensor, inverse: Tensor, filled: Tensor | None = None) -> Tensor:
    """Takes rows of ``x`` by ``index``; the gradient takes them back by ``inverse``, with no atomic addition.

    Args:
        x: ``(R, ...)``.
        index: ``(S,)`` int64, the row of ``x`` that each output row copies.
        inverse: ``(R,)`` int64, the output row that copies each row of ``x``, where one does.
        filled: bool; which rows of the longer side hold a real row. ``(S,)`` where ``S > R``: the others come out
            as zeros. ``(R,)`` where ``R > S``: the others were not taken and get a zero gradient.

    Returns:
        ``(S, ...)`` in the dtype of ``x``.

    Example:
        >>> permute(torch.tensor([[1.0], [2.0]]), torch.tensor([1, 0]), torch.tensor([1, 0])).tolist()
        [[2.0], [1.0]]
    """
    return _Permute.apply(x, index, inverse, filled)


class _Permute(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, index: Tensor, inverse: Tensor, filled: Tensor | None) -> Tensor:
        ctx.save_for_backward(index, inverse, filled)
        return _take(x, index, filled)

    @staticmethod
    def backward(ctx, grad: Tensor):
        _, inverse, filled = ctx.saved_tensors
        return _take(grad, inverse, filled), None, None, None


def _take(x: Tensor, index: Tensor, filled: Tensor | None) -> Tensor:
    if filled is not None and filled.shape != index.shape:
        filled = None  # it is of the other side
    return choose("permute", IMPLEMENTATIONS, x, index, filled)(x, index, filled)


IMPLEMENTATIONS = (
    Implementation("torch", reference.take),
    Implementation("cpp", cpp.take, why_not_compiled),
    Implementation("cuda", cuda.take, why_not_cuda),
    Implementation("triton", triton.take, why_not_triton),
    Implementation("reference", reference.take),
)
"""Of the gather that both directions are; on a CPU PyTorch's own is as fast."""

"""Rows by index, for implementations whose product does not gather by itself."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from omnimoe.ops.combine import combine


def take_rows(x: Tensor, index: Tensor) -> Tensor:
    """``x[index]`` for rows; the gradient is summed a row at a time, with no atomic addition.

    Args:
        x: ``(T, D)``.
        index: ``(R,)`` int64, in any order, a row as often as it likes.
    """
    return _TakeRows.apply(x, index)


class _TakeRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, index: Tensor) -> Tensor:
        ctx.save_for_backward(index)
        ctx.num_rows = x.shape[0]
        return x.index_select(0, index)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        (index,) = ctx.saved_tensors
        return combine(grad, index, grad.new_ones(grad.shape[0]), ctx.num_rows), None


def gathers_first(product: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Gives ``row_index`` to a product of rows that lie in order: they are taken before it."""

    @functools.wraps(product)
    def gathered(
        x: Tensor, weight: Tensor, offsets: Tensor, bias: Tensor | None = None, row_index: Tensor | None = None
    ) -> Tensor:
        return product(x if row_index is None else take_rows(x, row_index), weight, offsets, bias)

    return gathered

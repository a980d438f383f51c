"""The definition: an index, then zeros where no row was taken."""

from __future__ import annotations

from torch import Tensor


def take(x: Tensor, index: Tensor, filled: Tensor | None) -> Tensor:
    """Rows of ``x`` by ``index (S,)``; zeros where ``filled (S,)`` is false."""
    if len(x) == 0:  # a batch of padding alone has no rows to take
        return x.new_zeros(len(index), *x.shape[1:])
    y = x.index_select(0, index)
    if filled is not None:
        y = y.masked_fill_(~filled.view(-1, *(1,) * (y.ndim - 1)), 0)
    return y

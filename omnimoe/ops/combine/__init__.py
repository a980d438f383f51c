"""The weighted sum that ends a routed layer."""

from __future__ import annotations

from torch import Tensor


def combine(y: Tensor, token_index: Tensor, weights: Tensor, num_rows: int) -> Tensor:
    """Adds each routed row, times its weight, to the row it came from.

    Args:
        y: ``(R, D)``, what the experts made of the routed rows.
        token_index: ``(R,)`` int64, the row each came from.
        weights: ``(R,)`` floating point.
        num_rows: N.

    Returns:
        ``(N, D)`` in the dtype of ``y``; the product is taken in float32. A row that no expert took is zero.
    """
    weighted = (y * weights.unsqueeze(1)).to(y.dtype)
    return y.new_zeros(num_rows, y.shape[1]).index_add(0, token_index, weighted)

"""The weighted sum that ends a routed layer."""

from __future__ import annotations

import torch
from torch import Tensor


def combine(y: Tensor, token_index: Tensor, weights: Tensor, num_rows: int) -> Tensor:
    """Adds each routed row, times its weight, to the row it came from.

    Args:
        y: ``(R, D)``, what the experts made of the routed rows.
        token_index: ``(R,)`` int64, the row each came from.
        weights: ``(R,)`` floating point.
        num_rows: N.

    Returns:
        ``(N, D)`` in the dtype of ``y``; products and sums are taken in float32 (float64 for it) and rounded once. A
        row that no expert took is zero.
    """
    wide = torch.promote_types(y.dtype, torch.float32)
    weighted = y.to(wide) * weights.to(wide).unsqueeze(1)
    return y.new_zeros(num_rows, y.shape[1], dtype=wide).index_add(0, token_index, weighted).to(y.dtype)

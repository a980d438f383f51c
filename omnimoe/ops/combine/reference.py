"""The definition: each row times its weight, added to its token's in the order of the rows."""

from __future__ import annotations

import torch
from torch import Tensor


def combine(y: Tensor, token_index: Tensor, weights: Tensor, num_rows: int) -> Tensor:
    """See :func:`omnimoe.ops.combine`."""
    wide = torch.promote_types(y.dtype, torch.float32)
    weighted = y.to(wide) * weights.to(wide).unsqueeze(1)
    return y.new_zeros(num_rows, y.shape[1], dtype=wide).index_add(0, token_index, weighted).to(y.dtype)

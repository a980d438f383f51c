"""The compiled kernels for a CPU: rows are sorted by token, then each token adds up its own."""

from __future__ import annotations

import torch
from torch import Tensor

from omnimoe.ops._library import call


def combine(y: Tensor, token_index: Tensor, weights: Tensor, num_rows: int) -> Tensor:
    """See :func:`omnimoe.ops.combine`."""
    offsets, order, _ = call(torch.ops.omnimoe.route_plan, token_index, num_rows)
    weights = weights.to(torch.promote_types(y.dtype, torch.float32))
    return call(torch.ops.omnimoe.sum_rows, y, offsets, order, weights)

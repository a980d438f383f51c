"""The product with pools of unequal width: one product a pool."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from omnimoe.ops._pools import check_pools, runs
from omnimoe.ops.permute import permute


def grouped_mm(
    product: Callable[..., Tensor],
    x: Tensor,
    pools: Sequence[Tensor],
    offsets: Tensor,
    bias: Sequence[Tensor] | None,
    row_index: Tensor | None,
) -> Tensor:
    """See :func:`omnimoe.ops.grouped_mm`; ``product`` is it, for one pool."""
    check_pools(pools, offsets)
    depth, width = max(pool.shape[2] for pool in pools), max(pool.shape[1] for pool in pools)
    if x.ndim != 2 or x.shape[1] != depth:
        raise ValueError(f"x must be (R, {depth}), as deep as the deepest pool, got {tuple(x.shape)}")
    if bias is not None and len(bias) != len(pools):
        raise ValueError(f"there must be a bias for each of the {len(pools)} pools, got {len(bias)}")
    num_rows = len(x) if row_index is None else len(row_index)
    parts: list[Tensor] = []
    shifts: Sequence[Tensor | None] = [None] * len(pools) if bias is None else bias
    counts = [len(pool) for pool in pools]
    for pool, shift, run in zip(pools, shifts, runs(counts, offsets, num_rows), strict=True):
        given, place, back = x[:, : pool.shape[2]], run.place, run.back
        if place is None or back is None:
            if row_index is None:
                y = product(given[run.rows], pool, run.offsets, shift)
            else:
                y = product(given, pool, run.offsets, shift, row_index[run.rows])
        else:
            taken = place if row_index is None else row_index[place]
            y = permute(product(given, pool, run.offsets, shift, taken), back, place)
        parts.append(F.pad(y, (0, width - pool.shape[1])))
    if run.place is not None:
        return sum(parts[1:], parts[0])  # a row is zero in all parts but its own
    rest = num_rows - sum(len(part) for part in parts)
    return torch.cat([*parts, parts[0].new_zeros(rest, width)])

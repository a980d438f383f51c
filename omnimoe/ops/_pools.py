"""Banks in several pools: experts of one layer whose widths differ, such as those for text and those for pictures.

A pool is a stacked bank of its own and owns the groups that follow the last pool's. Its rows are a run of the rows in
group order. Where the host may read the offsets, the run is a slice; elsewhere the rows are turned around until the run
comes first, and what comes after it lies past the pool's last offset. So nothing is ever read back from a device.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from omnimoe.ops._spans import check_offsets


class Run(NamedTuple):
    """The rows of a pool.

    Args:
        offsets: ``(G_p,)`` int32, the end of each of its groups, counted from its first row.
        rows: its rows, where the host could read them.
        place: ``(R,)`` int64, the row that the pool's row r is, for all rows in a circle; None where ``rows`` is there.
        back: ``(R,)`` int64, its inverse.
    """

    offsets: Tensor
    rows: slice | None = None
    place: Tensor | None = None
    back: Tensor | None = None


def reads_offsets(x: Tensor) -> bool:
    """Whether the host may read offsets beside ``x``: on a CPU, outside a traced graph."""
    is_traced = torch.compiler.is_compiling() or isinstance(x, torch._subclasses.FakeTensor)
    return x.device.type == "cpu" and not is_traced


def check_pools(pools: Sequence[Tensor], offsets: Tensor) -> None:
    """Raises ValueError if a pool is no stacked bank, or the pools do not own as many groups as there are offsets."""
    if not pools or any(pool.ndim != 3 for pool in pools):
        raise ValueError(f"pools must be (G_p, F_p, D_p) each, got {[tuple(pool.shape) for pool in pools]}")
    groups = sum(pool.shape[0] for pool in pools)
    if offsets.dtype != torch.int32 or offsets.shape != (groups,):
        raise ValueError(f"offsets must be ({groups},) int32 for all pools, got {tuple(offsets.shape)} {offsets.dtype}")


def runs(counts: Sequence[int], offsets: Tensor, num_rows: int) -> Iterator[Run]:
    """The rows of each pool, by its number of groups; slices where the host may read offsets, else turns."""
    first = 0
    may_read = reads_offsets(offsets)
    if may_read:
        check_offsets(offsets, num_rows)
    for count in counts:
        last = first + count
        ends = offsets[first:last]
        if may_read:
            start = int(offsets[first - 1]) if first else 0
            yield Run(ends - start, rows=slice(start, int(ends[-1]) if len(ends) else start))
        else:
            begin = offsets[first - 1] if first else offsets.new_zeros(())
            row = torch.arange(num_rows, device=offsets.device)
            place, back = row + begin, row - begin
            # a remainder, which ONNX does not take of a number of rows that is open
            place = torch.where(place >= num_rows, place - num_rows, place)
            yield Run(ends - begin, place=place, back=torch.where(back < 0, back + num_rows, back))
        first = last

"""Host-side reading of group offsets, for implementations that walk over slices."""

from __future__ import annotations

import torch
from torch import Tensor


def spans(offsets: Tensor, num_rows: int) -> list[tuple[int, int, int]]:
    """``(group, start, stop)`` of every group that has rows.

    Args:
        offsets: ``(G,)`` int32, the end of each group's rows.
        num_rows: rows at hand; the last offset may not exceed it.

    Raises:
        ValueError: if the offsets decrease or end beyond ``num_rows``.
    """
    found, start = [], 0
    for group, stop in enumerate(offsets.tolist()):
        if stop < start or stop > num_rows:
            raise _bad(offsets, num_rows)
        if stop > start:
            found.append((group, start, stop))
        start = stop
    return found


def check_offsets(offsets: Tensor, num_rows: int) -> None:
    """Raises ValueError if the offsets decrease or end beyond ``num_rows``; not while a graph is traced."""
    if torch.compiler.is_compiling() or isinstance(offsets, torch._subclasses.FakeTensor):
        return
    ends = offsets.tolist()
    if any(stop < start for start, stop in zip([0, *ends], [*ends, num_rows], strict=True)):
        raise _bad(offsets, num_rows)


def _bad(offsets: Tensor, num_rows: int) -> ValueError:
    return ValueError(
        f"offsets must not decrease nor pass the {num_rows} rows, got {offsets.tolist()}; "
        "each entry is the end of a group's rows"
    )

"""The sizes of tiles: a fixed table by width of element and mean rows a group. Nothing is timed at run time.

The table was put together by arithmetic and never measured on a GPU: operands of all stages fit the 99 KiB of shared
memory that a block has from compute capability 8.6 on (8.0, 9.0 and 10.0 have more), and accumulators the registers,
which a test reads from what the compiler made for several capabilities.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

SHARED_MEMORY = 99 * 1024
"""Bytes a block may use on every GPU from capability 8.0 on."""
BAND = 8
"""Tiles of rows that share the columns of a matrix while they are in the cache."""


@dataclass(frozen=True)
class Tile:
    """One block's part of a product, ``rows`` by ``columns``, taken ``depth`` at a time."""

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int


# Upper bound of the mean rows a group, and the tile up to it. Few rows: the weights are read once whatever the tile is,
# so it is as low as the instructions allow.
_HALF = (
    (16, Tile(16, 128, 64, 4, 4)),
    (32, Tile(32, 128, 64, 4, 4)),
    (64, Tile(64, 128, 64, 4, 4)),
    (None, Tile(128, 128, 64, 8, 4)),
)
_SINGLE = (
    (16, Tile(16, 64, 32, 4, 3)),
    (32, Tile(32, 64, 32, 4, 3)),
    (None, Tile(64, 64, 32, 4, 3)),
)
# The gradient of a bank: rows and columns are those of a matrix, depth are rows of the batch.
_HALF_BANK = ((32, Tile(128, 128, 32, 8, 3)), (None, Tile(128, 128, 64, 8, 3)))
_SINGLE_BANK = ((None, Tile(64, 64, 32, 4, 3)),)


def product_tile(dtype: torch.dtype, rows: int, groups: int, *, pairs: bool = False) -> Tile:
    """The tile of rows times the matrices of their groups.

    Args:
        dtype: of the operands.
        rows: R.
        groups: G.
        pairs: two matrices are multiplied at once, gate and up; each gets half of the columns.
    """
    found = _find(_HALF if dtype.itemsize == 2 else _SINGLE, rows, groups)
    return Tile(found.rows, found.columns // 2, found.depth, found.warps, found.stages) if pairs else found


def bank_tile(dtype: torch.dtype, rows: int, groups: int) -> Tile:
    """The tile of a bank's gradient."""
    return _find(_HALF_BANK if dtype.itemsize == 2 else _SINGLE_BANK, rows, groups)


def all_tiles() -> list[tuple[torch.dtype, Tile]]:
    """Every entry of the tables, with a dtype that it is for."""
    half = [tile for table in (_HALF, _HALF_BANK) for _, tile in table]
    single = [tile for table in (_SINGLE, _SINGLE_BANK) for _, tile in table]
    return [(torch.bfloat16, tile) for tile in half] + [(torch.float32, tile) for tile in single]


def num_row_tiles(rows: int, groups: int, block: int) -> int:
    """At most so many tiles of ``block`` rows are needed, whatever rows are in which group or past their end."""
    return min(rows, (rows + (groups + 1) * (block - 1)) // block)


def _find(table: tuple[tuple[int | None, Tile], ...], rows: int, groups: int) -> Tile:
    mean = rows / max(groups, 1)
    return next(tile for bound, tile in table if bound is None or mean <= bound)

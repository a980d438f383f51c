"""Kernels that move rows and count them: lists of tiles, the stable sort by group, gathers, and sums in one order.

The sort is a radix sort of at most eight bits at a time. A block counts its entries by digit, PyTorch adds the counts
up, and a block then places each entry after those of lower digits, of earlier blocks, and of earlier entries: no
atomics, and entries of one group stay in order.
"""

from __future__ import annotations

from omnimoe.ops.triton.language import jit, tl


@jit
def larger(a, b):
    """For scans."""
    return tl.maximum(a, b)


@jit(do_not_specialize=("num_tiles", "num_rows"))
def tiles_kernel(
    offsets, tiles, bounds, num_tiles, num_groups, num_rows,
    BLOCK_M: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """``tiles (3, num_tiles)``: the group of each tile, its first row and the end of the group's rows.

    The group is -1 where there are no more tiles, and ``num_groups`` for rows past the last offset. ``bounds``
    ``(num_groups + 2,)`` begins with 0 and ends with ``num_rows``. Offsets that decrease or pass the rows are put right
    on the way: whatever they hold, no row outside of the operands is read.
    """
    tile = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    group = tl.zeros((BLOCK_T,), tl.int32)  # groups whose tiles all come before
    before = tl.zeros((BLOCK_T,), tl.int32)  # and the number of these tiles
    row = tl.zeros((BLOCK_T,), tl.int32)
    end = tl.zeros((BLOCK_T,), tl.int32) + num_rows
    last_end = tl.zeros((), tl.int32)
    num_before = tl.zeros((), tl.int32)
    for first in range(0, num_groups + 1, BLOCK_G):
        g = first + tl.arange(0, BLOCK_G)
        ends = tl.load(offsets + g, mask=g < num_groups, other=num_rows)
        ends = tl.minimum(tl.maximum(ends, 0), num_rows)
        ends = tl.maximum(tl.associative_scan(ends, 0, larger), last_end)
        starts = tl.load(offsets + g - 1, mask=(g > 0) & (g <= num_groups), other=0)
        starts = tl.where(g > num_groups, num_rows, tl.minimum(tl.maximum(starts, 0), num_rows))
        starts = tl.maximum(tl.associative_scan(starts, 0, larger), last_end)
        count = (ends - starts + BLOCK_M - 1) // BLOCK_M
        upto = num_before + tl.cumsum(count, 0)
        is_past = upto[None, :] <= tile[:, None]
        group += tl.sum(is_past.to(tl.int32), 1)
        before += tl.sum(tl.where(is_past, count[None, :], 0), 1)
        row = tl.maximum(row, tl.max(tl.where(is_past, ends[None, :], 0), 1))
        end = tl.minimum(end, tl.min(tl.where(is_past, num_rows, ends[None, :]), 1))
        last_end = tl.max(ends, 0)
        num_before += tl.sum(count, 0)
        if tl.program_id(0) == 0:
            tl.store(bounds + g, starts, mask=g <= num_groups)
            tl.store(bounds + g + 1, ends, mask=g == num_groups)
    inside = tile < num_tiles
    tl.store(tiles + tile, tl.where(group <= num_groups, group, -1), mask=inside)
    tl.store(tiles + num_tiles + tile, row + (tile - before) * BLOCK_M, mask=inside)
    tl.store(tiles + 2 * num_tiles + tile, end, mask=inside)


@jit
def keys_of(ids, entries, limit, inside, num_groups):
    """The groups of entries as int32; what is none, or stands at or past ``limit``, comes after the last group."""
    found = tl.load(ids + entries, mask=inside, other=-1)
    is_group = (found >= 0) & (found < num_groups)
    if limit is not None:
        is_group = is_group & (entries < tl.load(limit))
    return tl.where(is_group, found, num_groups).to(tl.int32)


@jit(do_not_specialize=("num_rows", "shift"))
def count_kernel(
    ids, order, limit, counts, num_rows, num_groups, shift,
    DIGITS: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """``counts[digit, block]``: how many of a block's entries have a digit."""
    rows = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    inside = rows < num_rows
    entries = rows if order is None else tl.load(order + rows, mask=inside, other=0).to(tl.int32)
    digit = (keys_of(ids, entries, limit, inside, num_groups) >> shift) & (DIGITS - 1)
    digit = tl.where(inside, digit, -1)
    for first in range(0, DIGITS, BLOCK_D):
        d = first + tl.arange(0, BLOCK_D)
        count = tl.sum((digit[:, None] == d[None, :]).to(tl.int32), 0)
        tl.store(counts + d * tl.num_programs(0) + tl.program_id(0), count, mask=d < DIGITS)


@jit(do_not_specialize=("num_rows", "shift"))
def place_kernel(
    ids, order, limit, counts, sums, placed, inverse, num_rows, num_groups, shift,
    DIGITS: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """``placed``, the entries sorted by digit; ``sums`` are the running sums of ``counts``. ``inverse`` may be None."""
    rows = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    inside = rows < num_rows
    entries = rows if order is None else tl.load(order + rows, mask=inside, other=0).to(tl.int32)
    digit = (keys_of(ids, entries, limit, inside, num_groups) >> shift) & (DIGITS - 1)
    digit = tl.where(inside, digit, -1)
    position = tl.zeros((BLOCK_R,), tl.int32)
    for first in range(0, DIGITS, BLOCK_D):
        d = first + tl.arange(0, BLOCK_D)
        at = d * tl.num_programs(0) + tl.program_id(0)
        start = tl.load(sums + at, mask=d < DIGITS, other=0) - tl.load(counts + at, mask=d < DIGITS, other=0)
        hit = digit[:, None] == d[None, :]
        rank = tl.cumsum(hit.to(tl.int32), 0) - 1 + start[None, :]
        position += tl.sum(tl.where(hit, rank, 0), 1)
    tl.store(placed + position, entries.to(placed.dtype.element_ty), mask=inside)
    if inverse is not None:
        tl.store(inverse + entries, position.to(inverse.dtype.element_ty), mask=inside)


@jit(do_not_specialize=("num_rows", "num_steps"))
def ends_kernel(ids, order, limit, offsets, num_rows, num_groups, num_steps, BLOCK_G: tl.constexpr):
    """``offsets[g]``: how many sorted entries have a group up to ``g``, by halving."""
    g = tl.program_id(0) * BLOCK_G + tl.arange(0, BLOCK_G)
    low = tl.zeros((BLOCK_G,), tl.int32)
    high = tl.zeros((BLOCK_G,), tl.int32) + num_rows
    for _ in range(num_steps):
        is_open = low < high
        middle = low + (high - low) // 2
        entries = tl.load(order + middle, mask=is_open, other=0).to(tl.int32)
        is_upto = keys_of(ids, entries, limit, is_open, num_groups) <= g
        low = tl.where(is_open & is_upto, middle + 1, low)
        high = tl.where(is_open & ~is_upto, middle, high)
    tl.store(offsets + g, low, mask=g < num_groups)


@jit(do_not_specialize=("num_rows", "num_source_rows"))
def gather_kernel(
    x, index, filled, y, num_rows, num_source_rows, D, stride_x, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr
):
    """``y[r] = x[index[r]]``, zeros where ``filled`` (may be None) is false."""
    rows = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    inside = rows < num_rows
    source = tl.load(index + rows, mask=inside, other=0)
    source = tl.minimum(tl.maximum(source, 0), num_source_rows - 1)
    is_read = inside
    if filled is not None:
        is_read = is_read & (tl.load(filled + rows, mask=inside, other=0) != 0)
    block = tl.load(x + source[:, None] * stride_x + d[None, :], mask=is_read[:, None] & (d < D)[None, :], other=0.0)
    tl.store(y + rows[:, None].to(tl.int64) * D + d[None, :], block, mask=inside[:, None] & (d < D)[None, :])


@jit(do_not_specialize=("num_rows",))
def sum_kernel(y, offsets, order, weights, out, num_rows, D, stride_y, BLOCK_D: tl.constexpr):
    """``out[t] = sum of weights[order[i]] * y[order[i]]`` over ``offsets[t - 1] <= i < offsets[t]``, in this order."""
    t = tl.program_id(0)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    start = tl.load(offsets + t - 1, mask=t > 0, other=0)
    end = tl.minimum(tl.load(offsets + t), num_rows)
    total = tl.zeros((BLOCK_D,), tl.float32)
    for i in range(tl.maximum(start, 0), end):
        row = tl.minimum(tl.maximum(tl.load(order + i), 0), num_rows - 1).to(tl.int64)
        part = tl.load(y + row * stride_y + d, mask=d < D, other=0.0).to(tl.float32)
        if weights is not None:
            part *= tl.load(weights + row)
        total += part
    tl.store(out + t.to(tl.int64) * D + d, total.to(out.dtype.element_ty), mask=d < D)

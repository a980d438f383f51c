"""Kernels of grouped products: rows times the matrix of their group, what experts do between two, and banks' gradients.

A block looks its tile up in a list that ``rows.tiles_kernel`` made on the device: a group, the tile's first row and the
end of the group's rows. The grid is an upper bound of such lists' length, so the host reads nothing; blocks without a
tile return at once. Rows past the last group's are tiles of a group of their own, which has no matrix: they come out as
zeros.

What is read for a row or column that does not exist is read from one that does and never stored. Along the depth, where
values of one row meet, it is replaced by zeros in both operands, as NaN times zero would be NaN.
"""

from __future__ import annotations

from omnimoe.ops.triton.activations import activate, gate_slopes
from omnimoe.ops.triton.language import INTERPRETED, jit, tl

VARYING = ("num_tiles", "num_source_rows")
"""What differs from call to call, and must not have a kernel compiled for each divisibility."""


@jit
def place(num_tiles, N, BLOCK_N: tl.constexpr, BAND: tl.constexpr):
    """The tile of rows and the columns of this block: bands of rows pass over all columns together."""
    block = tl.program_id(0)
    band = BAND * tl.cdiv(N, BLOCK_N)
    first = block // band * BAND
    height = tl.minimum(num_tiles - first, BAND)
    return first + block % band % height, block % band // height


@jit
def find_rows(row_index, rows, num_source_rows):
    """The rows of the operand that ``rows`` are, as int64 and never outside of it."""
    if row_index is not None:
        rows = tl.load(row_index + rows)
    return tl.minimum(tl.maximum(rows.to(tl.int64), 0), num_source_rows - 1)


@jit
def times(a, b, total, PRECISION: tl.constexpr):
    """``total + a @ b`` in float32."""
    if INTERPRETED:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, total, input_precision=PRECISION)


@jit
def matrix_columns(matrix, n, N, ld, BLOCK_K: tl.constexpr, ALONG_COLUMNS: tl.constexpr):
    """Pointers to the first ``BLOCK_K`` of the depth of columns ``n`` of the product, and which columns exist.

    A matrix lies in memory with the depth running fastest, or, ``ALONG_COLUMNS``, the columns.
    """
    k = tl.arange(0, BLOCK_K)
    if ALONG_COLUMNS:
        pointers = matrix + k[:, None].to(tl.int64) * ld + n[None, :]
    else:
        pointers = matrix + tl.minimum(n, N - 1)[None, :].to(tl.int64) * ld + k[:, None]
    return pointers


@jit
def load_matrix(pointers, n, N, left, BLOCK_K: tl.constexpr, ALONG_COLUMNS: tl.constexpr, EVEN: tl.constexpr):
    """A block of a matrix, zeros where the depth or the columns end."""
    k = tl.arange(0, BLOCK_K)
    if ALONG_COLUMNS:
        inside = (n < N)[None, :]
        if not EVEN:
            inside = inside & (k < left)[:, None]
        block = tl.load(pointers, mask=inside, other=0.0)
    elif EVEN:
        block = tl.load(pointers)
    else:
        block = tl.load(pointers, mask=(k < left)[:, None], other=0.0)
    return block


@jit
def product(
    x_pointers, w_pointers, n, N, depth, ld,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    ALONG_COLUMNS: tl.constexpr, EVEN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A tile of rows times columns ``n`` of a matrix, over a depth that may be zero."""
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for k in range(0, depth, BLOCK_K):
        if EVEN:
            a = tl.load(x_pointers)
        else:
            a = tl.load(x_pointers, mask=(tl.arange(0, BLOCK_K) < depth - k)[None, :], other=0.0)
        b = load_matrix(w_pointers, n, N, depth - k, BLOCK_K, ALONG_COLUMNS, EVEN)
        total = times(a, b, total, PRECISION)
        x_pointers += BLOCK_K
        w_pointers += BLOCK_K * ld if ALONG_COLUMNS else BLOCK_K
    return total


@jit(do_not_specialize=VARYING)
def multiply_kernel(
    x, weight, y, tiles, row_index, bias, scale,
    num_tiles, num_groups, num_source_rows, N, K, stride_x, stride_g, ld, stride_y,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BAND: tl.constexpr,
    ALONG_COLUMNS: tl.constexpr, EVEN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """``y[r] = scale[r] * (weight[group] @ x[row_index[r]] + bias[group])``; index, bias and scale may be None."""
    m_tile, n_tile = place(num_tiles, N, BLOCK_N, BAND)
    group = tl.load(tiles + m_tile)
    if group < 0:
        return
    end = tl.load(tiles + 2 * num_tiles + m_tile)
    rows = tl.load(tiles + num_tiles + m_tile) + tl.arange(0, BLOCK_M)
    n = n_tile * BLOCK_N + tl.arange(0, BLOCK_N)
    source = find_rows(row_index, tl.minimum(rows, end - 1), num_source_rows)
    x_pointers = x + source[:, None] * stride_x + tl.arange(0, BLOCK_K)[None, :]
    w_pointers = matrix_columns(weight + group.to(tl.int64) * stride_g, n, N, ld, BLOCK_K, ALONG_COLUMNS)
    depth = tl.where(group < num_groups, K, 0)
    total = product(x_pointers, w_pointers, n, N, depth, ld, BLOCK_M, BLOCK_N, BLOCK_K, ALONG_COLUMNS, EVEN, PRECISION)
    is_real = (rows < end) & (group < num_groups)
    if bias is not None:
        bias_at = bias + group.to(tl.int64) * N + n
        total += tl.load(bias_at, mask=(n < N) & (group < num_groups), other=0.0).to(tl.float32)[None, :]
    if scale is not None:
        total *= tl.load(scale + rows, mask=is_real, other=0.0)[:, None]
    y_pointers = y + rows.to(tl.int64)[:, None] * stride_y + n[None, :]
    tl.store(y_pointers, total.to(y.dtype.element_ty), mask=(rows < end)[:, None] & (n < N)[None, :])


@jit(do_not_specialize=VARYING)
def hidden_kernel(
    x, weight, hidden, z, tiles, row_index, bias,
    num_tiles, num_groups, num_source_rows, F, K, stride_x, stride_g, ld,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BAND: tl.constexpr,
    ALONG_COLUMNS: tl.constexpr, EVEN: tl.constexpr, PRECISION: tl.constexpr,
    KIND: tl.constexpr, GATED: tl.constexpr, INTERLEAVED: tl.constexpr,
):  # fmt: skip
    """The pre-activations ``z`` (may be None) and ``hidden = act(z)``, or ``act(gate) * up``.

    Gate and up of the same columns are multiplied by one block, so that their rows may lie anywhere in the matrix.
    """
    m_tile, n_tile = place(num_tiles, F, BLOCK_N, BAND)
    group = tl.load(tiles + m_tile)
    if group < 0:
        return
    end = tl.load(tiles + 2 * num_tiles + m_tile)
    rows = tl.load(tiles + num_tiles + m_tile) + tl.arange(0, BLOCK_M)
    f = n_tile * BLOCK_N + tl.arange(0, BLOCK_N)
    wide = 2 * F if GATED else F
    one, other = pair_of(f, F, GATED, INTERLEAVED)
    source = find_rows(row_index, tl.minimum(rows, end - 1), num_source_rows)
    x_pointers = x + source[:, None] * stride_x + tl.arange(0, BLOCK_K)[None, :]
    matrix = weight + group.to(tl.int64) * stride_g
    w_pointers = matrix_columns(matrix, one, wide, ld, BLOCK_K, ALONG_COLUMNS)
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    if GATED:
        up_pointers = matrix_columns(matrix, other, wide, ld, BLOCK_K, ALONG_COLUMNS)
        up = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    depth = tl.where(group < num_groups, K, 0)
    for k in range(0, depth, BLOCK_K):
        if EVEN:
            a = tl.load(x_pointers)
        else:
            a = tl.load(x_pointers, mask=(tl.arange(0, BLOCK_K) < K - k)[None, :], other=0.0)
        b = load_matrix(w_pointers, one, wide, K - k, BLOCK_K, ALONG_COLUMNS, EVEN)
        total = times(a, b, total, PRECISION)
        x_pointers += BLOCK_K
        w_pointers += BLOCK_K * ld if ALONG_COLUMNS else BLOCK_K
        if GATED:
            c = load_matrix(up_pointers, other, wide, K - k, BLOCK_K, ALONG_COLUMNS, EVEN)
            up = times(a, c, up, PRECISION)
            up_pointers += BLOCK_K * ld if ALONG_COLUMNS else BLOCK_K
    is_stored = (rows < end)[:, None] & (f < F)[None, :]
    has_bias = (f < F) & (group < num_groups)
    if bias is not None:
        bias_at = bias + group.to(tl.int64) * wide
        total += tl.load(bias_at + one, mask=has_bias, other=0.0).to(tl.float32)[None, :]
        if GATED:
            up += tl.load(bias_at + other, mask=has_bias, other=0.0).to(tl.float32)[None, :]
    at = rows.to(tl.int64)[:, None]
    if z is not None:
        tl.store(z + at * wide + one[None, :], total.to(z.dtype.element_ty), mask=is_stored)
        if GATED:
            tl.store(z + at * wide + other[None, :], up.to(z.dtype.element_ty), mask=is_stored)
    if GATED:
        value, _, _ = gate_slopes(total, up, KIND)
    else:
        value, _ = activate(total, KIND)
    tl.store(hidden + at * F + f[None, :], value.to(hidden.dtype.element_ty), mask=is_stored)


@jit
def pair_of(f, F, GATED: tl.constexpr, INTERLEAVED: tl.constexpr):
    """Where the gate and the up of hidden column ``f`` stand among the pre-activations."""
    if not GATED:
        one = f
        other = f
    elif INTERLEAVED:
        one = 2 * f
        other = 2 * f + 1
    else:
        one = f
        other = F + f
    return one, other


@jit(do_not_specialize=(*VARYING, "num_rows"))
def grad_hidden_kernel(
    grad, weight, z, scaled, grad_z, shares, tiles, row_index, scale,
    num_tiles, num_groups, num_source_rows, num_rows, F, K, stride_x, stride_g, ld,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BAND: tl.constexpr,
    ALONG_COLUMNS: tl.constexpr, EVEN: tl.constexpr, PRECISION: tl.constexpr,
    KIND: tl.constexpr, GATED: tl.constexpr, INTERLEAVED: tl.constexpr,
):  # fmt: skip
    """The gradient of ``hidden``, ``weight[group].T @ grad[row_index[r]]``, and all that is made of it and of ``z``.

    That is ``grad_z``; ``scaled = scale * hidden``, the operand of the gradient of ``weight``; and, one row of
    ``shares`` for each tile of columns, the part that these columns have in the gradient of ``scale``.
    """
    m_tile, n_tile = place(num_tiles, F, BLOCK_N, BAND)
    group = tl.load(tiles + m_tile)
    if group < 0:
        return
    end = tl.load(tiles + 2 * num_tiles + m_tile)
    rows = tl.load(tiles + num_tiles + m_tile) + tl.arange(0, BLOCK_M)
    f = n_tile * BLOCK_N + tl.arange(0, BLOCK_N)
    wide = 2 * F if GATED else F
    source = find_rows(row_index, tl.minimum(rows, end - 1), num_source_rows)
    x_pointers = grad + source[:, None] * stride_x + tl.arange(0, BLOCK_K)[None, :]
    w_pointers = matrix_columns(weight + group.to(tl.int64) * stride_g, f, F, ld, BLOCK_K, ALONG_COLUMNS)
    depth = tl.where(group < num_groups, K, 0)
    total = product(x_pointers, w_pointers, f, F, depth, ld, BLOCK_M, BLOCK_N, BLOCK_K, ALONG_COLUMNS, EVEN, PRECISION)
    is_stored = (rows < end)[:, None] & (f < F)[None, :]
    is_real = is_stored & (group < num_groups)  # what stands past the last group's rows is not read
    one, other = pair_of(f, F, GATED, INTERLEAVED)
    at = rows.to(tl.int64)[:, None]
    gate = tl.load(z + at * wide + one[None, :], mask=is_real, other=0.0).to(tl.float32)
    if GATED:
        up = tl.load(z + at * wide + other[None, :], mask=is_real, other=0.0).to(tl.float32)
        value, by_gate, by_up = gate_slopes(gate, up, KIND)
    else:
        value, by_gate = activate(gate, KIND)
    if shares is not None:
        share = tl.sum(tl.where(is_real, total * value, 0.0), 1)
        tl.store(shares + n_tile.to(tl.int64) * num_rows + rows, share, mask=rows < end)
    if scale is not None:
        weights = tl.load(scale + rows, mask=(rows < end) & (group < num_groups), other=0.0)[:, None]
        total *= weights
        value *= weights
    tl.store(scaled + at * F + f[None, :], value.to(scaled.dtype.element_ty), mask=is_stored)
    tl.store(grad_z + at * wide + one[None, :], (total * by_gate).to(grad_z.dtype.element_ty), mask=is_stored)
    if GATED:
        tl.store(grad_z + at * wide + other[None, :], (total * by_up).to(grad_z.dtype.element_ty), mask=is_stored)


@jit(do_not_specialize=("num_grad_rows", "num_x_rows"))
def bank_kernel(
    grad, x, out, bounds, grad_index, x_index,
    num_grad_rows, num_x_rows, F, D, stride_grad, stride_x,
    BLOCK_F: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_R: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """``out[group] = sum over its rows of outer(grad[grad_index[r]], x[x_index[r]])``; zeros without rows."""
    tile = tl.program_id(0)
    group = tl.program_id(1)
    f = tile // tl.cdiv(D, BLOCK_D) * BLOCK_F + tl.arange(0, BLOCK_F)
    d = tile % tl.cdiv(D, BLOCK_D) * BLOCK_D + tl.arange(0, BLOCK_D)
    start = tl.load(bounds + group)
    end = tl.load(bounds + group + 1)
    total = tl.zeros((BLOCK_F, BLOCK_D), tl.float32)
    for first in range(start, end, BLOCK_R):
        rows = first + tl.arange(0, BLOCK_R)
        inside = rows < end
        rows = tl.minimum(rows, end - 1)
        grad_rows = find_rows(grad_index, rows, num_grad_rows)
        x_rows = find_rows(x_index, rows, num_x_rows)
        grad_at = grad + grad_rows[None, :] * stride_grad + f[:, None]
        x_at = x + x_rows[:, None] * stride_x + d[None, :]
        a = tl.load(grad_at, mask=(f < F)[:, None] & inside[None, :], other=0.0)
        b = tl.load(x_at, mask=inside[:, None] & (d < D)[None, :], other=0.0)
        total = times(a, b, total, PRECISION)
    out_at = out + group.to(tl.int64) * F * D + f[:, None].to(tl.int64) * D + d[None, :]
    tl.store(out_at, total.to(out.dtype.element_ty), mask=(f < F)[:, None] & (d < D)[None, :])


@jit(do_not_specialize=("num_source_rows",))
def bias_kernel(
    grad, out, bounds, row_index, scale, num_source_rows, N, stride_grad, BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr
):
    """``out[group] = sum over its rows of scale[r] * grad[row_index[r]]``."""
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    group = tl.program_id(1)
    end = tl.load(bounds + group + 1)
    total = tl.zeros((BLOCK_N,), tl.float32)
    for first in range(tl.load(bounds + group), end, BLOCK_R):
        rows = first + tl.arange(0, BLOCK_R)
        inside = rows < end
        source = find_rows(row_index, tl.minimum(rows, end - 1), num_source_rows)
        at = grad + source[:, None] * stride_grad + n[None, :]
        block = tl.load(at, mask=inside[:, None] & (n < N)[None, :], other=0.0).to(tl.float32)
        if scale is not None:
            block *= tl.load(scale + rows, mask=inside, other=0.0)[:, None]
        total += tl.sum(block, 0)
    tl.store(out + group.to(tl.int64) * N + n, total.to(out.dtype.element_ty), mask=n < N)


@jit(do_not_specialize=VARYING)
def bias_share_kernel(
    grad, bias, shares, tiles, row_index, num_tiles, num_groups, num_source_rows, N, stride_grad,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """``shares[r] = grad[row_index[r]] . bias[group]``, the part of the bias in the gradient of a row's weight."""
    m_tile = tl.program_id(0)
    group = tl.load(tiles + m_tile)
    if group < 0:
        return
    end = tl.load(tiles + 2 * num_tiles + m_tile)
    rows = tl.load(tiles + num_tiles + m_tile) + tl.arange(0, BLOCK_M)
    source = find_rows(row_index, tl.minimum(rows, end - 1), num_source_rows)
    total = tl.zeros((BLOCK_M,), tl.float32)
    for first in range(0, tl.where(group < num_groups, N, 0), BLOCK_N):
        n = first + tl.arange(0, BLOCK_N)
        block = tl.load(grad + source[:, None] * stride_grad + n[None, :], mask=(n < N)[None, :], other=0.0)
        added = tl.load(bias + group.to(tl.int64) * N + n, mask=n < N, other=0.0).to(tl.float32)
        total += tl.sum(block.to(tl.float32) * added[None, :], 1)
    tl.store(shares + rows, total, mask=rows < end)

"""The ops over the kernels: sizes, tiles, memory and order of launches. Nothing here reads what is on a device."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from omnimoe.ops.triton import DTYPES, products
from omnimoe.ops.triton import rows as moves
from omnimoe.ops.triton.tiles import BAND, Tile, bank_tile, num_row_tiles, product_tile

Given = TypeVar("Given", Tensor, "Tensor | None")

DIGIT_BITS = 8
"""Bits the sort takes at a time."""
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True)
class Groups:
    """Rows of each group, as a list of tiles and as bounds, both on the device."""

    tiles: Tensor
    bounds: Tensor
    count: int
    num_tiles: int


def grouped_mm(
    x: Tensor, weight: Tensor, offsets: Tensor, bias: Tensor | None = None, row_index: Tensor | None = None,
    transposed: bool = False,
) -> Tensor:  # fmt: skip
    """See the schema in ``omnimoe.ops._library``, as for all that follow."""
    _check_types(x, weight=weight, bias=bias)
    offsets, row_index = _index("offsets", offsets), _index("row_index", row_index)
    matrices = weight.transpose(1, 2) if transposed else weight
    rows = len(x) if row_index is None else len(row_index)
    if not rows or not len(x):
        return x.new_zeros(rows, matrices.shape[1])
    tile = product_tile(x.dtype, rows, len(offsets))
    return _multiply(x, matrices, groups_of(offsets, rows, tile.rows), tile, rows, bias, row_index)


def grouped_wgrad(
    grad: Tensor, x: Tensor, offsets: Tensor, grad_index: Tensor | None = None, x_index: Tensor | None = None
) -> Tensor:
    """The gradient of a bank."""
    _check_types(x, grad=grad)
    offsets = _index("offsets", offsets)
    grad_index, x_index = _index("grad_index", grad_index), _index("x_index", x_index)
    rows = len(x) if x_index is None else len(x_index)
    if not rows or not len(x) or not len(grad):
        return x.new_zeros(len(offsets), grad.shape[1], x.shape[1])
    return _bank(grad, x, groups_of(offsets, rows, 0), rows, grad_index, x_index)


def route_plan(expert_ids: Tensor, num_groups: int) -> tuple[Tensor, Tensor, Tensor]:
    """The stable sort by group."""
    expert_ids = _index("expert_ids", expert_ids)
    inverse = torch.empty_like(expert_ids)
    offsets, order = _sort(expert_ids, num_groups, None, inverse)
    return offsets, order, inverse


def gather_rows(x: Tensor, index: Tensor, filled: Tensor | None) -> Tensor:
    """Rows by index."""
    index = _index("index", index)
    rows, width = len(index), math.prod(x.shape[1:])
    y = x.new_empty(rows, *x.shape[1:])
    if not len(x):
        return y.zero_()
    if not rows or not width:
        return y
    bits = _BITS[x.element_size()]
    source = _with_rows(x.reshape(len(x), width).view(bits))
    block = min(_power_of_two(width), 512)
    height = max(1, 2048 // block)
    if filled is not None:
        filled = filled.contiguous().view(torch.uint8)
    _launch(
        moves.gather_kernel, (_blocks(rows, height), _blocks(width, block)),
        source, index, filled, y.view(bits), rows, len(x), width, source.stride(0), BLOCK_R=height, BLOCK_D=block,
    )  # fmt: skip
    return y


def sum_rows(y: Tensor, offsets: Tensor, order: Tensor, weights: Tensor | None) -> Tensor:
    """Weighted sums of rows, in the order that is given."""
    _check_types(y)
    offsets, order = _index("offsets", offsets), _index("order", order)
    count, width = len(offsets), y.shape[1]
    out = y.new_empty(count, width)
    if not len(y):
        return out.zero_()
    if not count or not width:
        return out
    y, weights = _with_rows(y), _in_float32(weights)
    block = min(_power_of_two(width), 1024)
    _launch(
        moves.sum_kernel, (count, _blocks(width, block)),
        y, offsets, order, weights, out, len(y), width, y.stride(0), BLOCK_D=block,
    )  # fmt: skip
    return out


def experts_mlp(
    x: Tensor, w_in: Tensor, w_out: Tensor, offsets: Tensor, token_index: Tensor | None, weights: Tensor | None,
    b_in: Tensor | None, b_out: Tensor | None, activation: int, interleaved: bool, keep: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The network of each group, from gather to sum."""
    _check_types(x, w_in=w_in, w_out=w_out, b_in=b_in, b_out=b_out)
    offsets, token_index = _index("offsets", offsets), _index("token_index", token_index)
    rows, width, wide = len(x) if token_index is None else len(token_index), w_out.shape[2], w_in.shape[1]
    z = x.new_empty(rows if keep else 0, wide)
    if not rows or not len(x):
        return x.new_zeros(x.shape), z.zero_()
    tile = product_tile(x.dtype, rows, len(offsets))
    groups = groups_of(offsets, rows, tile.rows)
    hidden = x.new_empty(rows, width)
    _hidden(x, w_in, groups, hidden, z if keep else None, token_index, b_in, activation, interleaved)
    if token_index is None:
        return _multiply(hidden, w_out, groups, tile, rows, b_out, None, weights), z
    y = _multiply(hidden, w_out, groups, tile, rows, b_out)
    return _sum_by_token(y, token_index, weights, len(x), groups), z


def experts_mlp_backward(
    grad: Tensor, x: Tensor, z: Tensor, w_in: Tensor, w_out: Tensor, offsets: Tensor, token_index: Tensor | None,
    weights: Tensor | None, b_in: Tensor | None, b_out: Tensor | None, activation: int, interleaved: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """The gradients of :func:`experts_mlp`, from its input and its pre-activations alone.

    What the experts gave back is not needed for the gradient of the weights: with ``h`` the hidden values, it is
    ``grad . (W h + b) = (W' grad) . h + grad . b``, and ``W' grad`` is computed anyway.

    Source: https://arxiv.org/abs/2512.14080.
    """
    _check_types(x, grad=grad, z=z, w_in=w_in, w_out=w_out, b_in=b_in, b_out=b_out)
    offsets, token_index = _index("offsets", offsets), _index("token_index", token_index)
    rows = len(z)
    nothing = x.new_zeros(0)
    if not rows or not len(x):
        found = [torch.zeros_like(part, memory_format=torch.contiguous_format) for part in (x, w_in, w_out)]
        biases = [nothing if part is None else part.new_zeros(part.shape) for part in (b_in, b_out)]
        share = nothing.float() if weights is None else weights.new_zeros(rows, dtype=torch.float32)
        return found[0], found[1], found[2], share, biases[0], biases[1]
    tile = product_tile(x.dtype, rows, len(offsets))
    groups = groups_of(offsets, rows, tile.rows)
    scaled, grad_z, shares = _grad_hidden(
        grad, z, w_out, groups, token_index, weights, b_out, activation, interleaved, wide=w_in.shape[1]
    )
    grad_rows = _multiply(grad_z, w_in.transpose(1, 2), groups, tile, rows)
    return (
        grad_rows if token_index is None else _sum_by_token(grad_rows, token_index, None, len(x), groups),
        _bank(grad_z, x, groups, rows, None, token_index),
        _bank(grad, scaled, groups, rows, token_index, None),
        nothing.float() if shares is None else shares.sum(0),
        nothing if b_in is None else _bias(grad_z, groups, None, None),
        nothing if b_out is None else _bias(grad, groups, token_index, weights),
    )


def groups_of(offsets: Tensor, rows: int, block: int) -> Groups:
    """Tiles of ``block`` rows (none if it is 0), and the bounds of each group within ``rows``."""
    count = len(offsets)
    num_tiles = num_row_tiles(rows, count, block) if block else 0
    tiles = torch.empty(3, num_tiles, dtype=torch.int32, device=offsets.device)
    bounds = torch.empty(count + 2, dtype=torch.int32, device=offsets.device)
    _launch(
        moves.tiles_kernel, (max(1, _blocks(num_tiles, 64)),),
        offsets, tiles, bounds, num_tiles, count, rows,
        BLOCK_M=max(block, 1), BLOCK_G=min(_power_of_two(count + 1), 128), BLOCK_T=64,
    )  # fmt: skip
    return Groups(tiles, bounds, count, num_tiles)


def _multiply(
    x: Tensor, matrices: Tensor, groups: Groups, tile: Tile, rows: int, bias: Tensor | None = None,
    row_index: Tensor | None = None, scale: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """``scale * (matrices @ x + bias)``, row by row."""
    x, (matrices, ld, along_columns) = _with_rows(x), _layout(matrices)
    columns, depth = matrices.shape[1:]
    y = x.new_empty(rows, columns)
    if columns:
        _launch(
            products.multiply_kernel, (groups.num_tiles * _blocks(columns, tile.columns),),
            x, matrices, y, groups.tiles, row_index, _contiguous(bias), _in_float32(scale),
            groups.num_tiles, groups.count, len(x), columns, depth, x.stride(0), matrices.stride(0), ld, y.stride(0),
            **_options(tile, x.dtype, depth, along_columns),
        )  # fmt: skip
    return y


def _hidden(
    x: Tensor, w_in: Tensor, groups: Groups, hidden: Tensor, z: Tensor | None, token_index: Tensor | None,
    b_in: Tensor | None, activation: int, interleaved: bool,
) -> None:  # fmt: skip
    """Writes ``hidden`` and, where there is one, ``z``."""
    x, (w_in, ld, along_columns) = _with_rows(x), _layout(w_in)
    rows, width = hidden.shape
    if not width:
        return
    is_gated = w_in.shape[1] == 2 * width
    tile = product_tile(x.dtype, rows, groups.count, pairs=is_gated)
    _launch(
        products.hidden_kernel, (groups.num_tiles * _blocks(width, tile.columns),),
        x, w_in, hidden, z, groups.tiles, token_index, _contiguous(b_in),
        groups.num_tiles, groups.count, len(x), width, x.shape[1], x.stride(0), w_in.stride(0), ld,
        KIND=activation, GATED=is_gated, INTERLEAVED=interleaved,
        **_options(tile, x.dtype, x.shape[1], along_columns),
    )  # fmt: skip


def _grad_hidden(
    grad: Tensor, z: Tensor, w_out: Tensor, groups: Groups, token_index: Tensor | None, weights: Tensor | None,
    b_out: Tensor | None, activation: int, interleaved: bool, *, wide: int,
) -> tuple[Tensor, Tensor, Tensor | None]:  # fmt: skip
    """``(scaled, grad_z, shares)``: hidden values times weights, the gradient of ``z``, parts of that of weights."""
    grad, z, (matrices, ld, along_columns) = _with_rows(grad), z.contiguous(), _layout(w_out.transpose(1, 2))
    rows, width, depth = len(z), w_out.shape[2], w_out.shape[1]
    is_gated = wide == 2 * width
    tile = product_tile(z.dtype, rows, groups.count, pairs=True)  # its sums leave room for what is made of them
    num_columns = _blocks(width, tile.columns)
    scaled, grad_z = z.new_empty(rows, width), torch.empty_like(z)
    has_share = weights is not None and b_out is not None
    shares = None if weights is None else z.new_empty(num_columns + has_share, rows, dtype=torch.float32)
    if width:
        _launch(
            products.grad_hidden_kernel, (groups.num_tiles * num_columns,),
            grad, matrices, z, scaled, grad_z, shares, groups.tiles, token_index, _in_float32(weights),
            groups.num_tiles, groups.count, len(grad), rows, width, depth, grad.stride(0), matrices.stride(0), ld,
            KIND=activation, GATED=is_gated, INTERLEAVED=interleaved,
            **_options(tile, z.dtype, depth, along_columns),
        )  # fmt: skip
    if shares is not None and has_share:
        _launch(
            products.bias_share_kernel, (groups.num_tiles,),
            grad, _contiguous(b_out), shares[num_columns], groups.tiles, token_index,
            groups.num_tiles, groups.count, len(grad), depth, grad.stride(0), BLOCK_M=tile.rows, BLOCK_N=64,
        )  # fmt: skip
    return scaled, grad_z, shares


def _bank(
    grad: Tensor, x: Tensor, groups: Groups, rows: int, grad_index: Tensor | None, x_index: Tensor | None
) -> Tensor:
    """The gradient of a bank: outer products of rows, summed by group."""
    grad, x = _with_rows(grad), _with_rows(x)
    out = x.new_empty(groups.count, grad.shape[1], x.shape[1])
    if out.numel():
        tile = bank_tile(x.dtype, rows, groups.count)
        # an index is loaded ahead of what it points to, so its stages come on top
        stages = tile.stages if grad_index is None and x_index is None else 2 * tile.stages - 1
        _launch(
            products.bank_kernel,
            (_blocks(grad.shape[1], tile.rows) * _blocks(x.shape[1], tile.columns), groups.count),
            grad, x, out, groups.bounds, grad_index, x_index,
            len(grad), len(x), grad.shape[1], x.shape[1], grad.stride(0), x.stride(0),
            BLOCK_F=tile.rows, BLOCK_D=tile.columns, BLOCK_R=tile.depth, PRECISION=_precision(x.dtype),
            num_warps=tile.warps, num_stages=stages,
        )  # fmt: skip
    return out


def _bias(grad: Tensor, groups: Groups, row_index: Tensor | None, scale: Tensor | None) -> Tensor:
    """The gradient of a bias: rows summed by group."""
    grad = _with_rows(grad)
    out = grad.new_empty(groups.count, grad.shape[1])
    if out.numel():
        _launch(
            products.bias_kernel, (_blocks(grad.shape[1], 64), groups.count),
            grad, out, groups.bounds, row_index, _in_float32(scale), len(grad), grad.shape[1], grad.stride(0),
            BLOCK_R=32, BLOCK_N=64,
        )  # fmt: skip
    return out


def _sum_by_token(y: Tensor, token_index: Tensor, weights: Tensor | None, tokens: int, groups: Groups) -> Tensor:
    """Rows of groups, added up by token; rows past the last group's are left out."""
    ends, order = _sort(token_index, tokens, groups.bounds[groups.count :], None)
    return sum_rows(y, ends, order, weights)


def _sort(ids: Tensor, num_groups: int, limit: Tensor | None, inverse: Tensor | None) -> tuple[Tensor, Tensor]:
    """The ends of the groups, and the entries in their order; entries from ``limit`` on are of no group."""
    rows = len(ids)
    offsets = torch.empty(num_groups, dtype=torch.int32, device=ids.device)
    if not rows:
        return offsets.zero_(), torch.empty_like(ids)
    bits = max(1, num_groups.bit_length())
    passes = _blocks(bits, DIGIT_BITS)
    width = _blocks(bits, passes)
    blocks, digits = _blocks(rows, 256), 1 << width
    sizes = {"DIGITS": digits, "BLOCK_R": 256, "BLOCK_D": min(digits, 32), "num_warps": 8}
    order = None
    for step in range(passes):
        is_last = step == passes - 1
        counts = torch.empty(digits * blocks, dtype=torch.int32, device=ids.device)
        _launch(moves.count_kernel, (blocks,), ids, order, limit, counts, rows, num_groups, step * width, **sizes)
        placed = torch.empty(rows, dtype=torch.int64 if is_last else torch.int32, device=ids.device)
        _launch(
            moves.place_kernel, (blocks,),
            ids, order, limit, counts, counts.cumsum(0, dtype=torch.int32), placed, inverse if is_last else None,
            rows, num_groups, step * width, **sizes,
        )  # fmt: skip
        order = placed
    assert order is not None
    if num_groups:
        grid = (_blocks(num_groups, 128),)
        steps = rows.bit_length()
        _launch(moves.ends_kernel, grid, ids, order, limit, offsets, rows, num_groups, steps, BLOCK_G=128)
    return offsets, order


def _options(tile: Tile, dtype: torch.dtype, depth: int, along_columns: bool) -> dict[str, Any]:
    return {
        "BLOCK_M": tile.rows, "BLOCK_N": tile.columns, "BLOCK_K": tile.depth, "BAND": BAND,
        "ALONG_COLUMNS": along_columns, "EVEN": depth % tile.depth == 0, "PRECISION": _precision(dtype),
        "num_warps": tile.warps, "num_stages": tile.stages,
    }  # fmt: skip


def _precision(dtype: torch.dtype) -> str:
    """Products of float32 are exact in float32, unless PyTorch allows less."""
    is_less = dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32"
    return "tf32" if is_less else "ieee"


def _launch(kernel: Any, grid: tuple[int, ...], *operands: Any, **options: Any) -> None:
    """Starts a kernel on the device of its operands."""
    device = next(part for part in operands if isinstance(part, Tensor))
    with torch.cuda.device_of(device):
        kernel[grid](*operands, **options)


def _layout(matrices: Tensor) -> tuple[Tensor, int, bool]:
    """Matrices that lie densely along the depth or along the columns, the other stride, and whether along columns."""
    if matrices.stride(2) == 1:
        return matrices, matrices.stride(1), False
    if matrices.stride(1) == 1:
        return matrices, matrices.stride(2), True
    matrices = matrices.contiguous()
    return matrices, matrices.stride(1), False


def _with_rows(x: Tensor) -> Tensor:
    """``x``, copied if its rows are not dense."""
    return x if x.stride(1) == 1 else x.contiguous()


def _contiguous(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.contiguous()


def _in_float32(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.to(torch.float32).contiguous()


def _blocks(count: int, block: int) -> int:
    return -(-count // block)


def _power_of_two(count: int) -> int:
    return 1 << max(count - 1, 0).bit_length()


def _check_types(x: Tensor, **others: Tensor | None) -> None:
    if x.dtype not in DTYPES:
        raise ValueError(f"the Triton kernels take {', '.join(map(str, DTYPES))}, not {x.dtype}")
    for name, other in others.items():
        if other is not None and (other.dtype != x.dtype or other.device != x.device):
            raise ValueError(f"{name} must be {x.dtype} on {x.device}, got {other.dtype} on {other.device}")


def _index(name: str, index: Given) -> Given:
    """The index, dense; refused if it is not what a kernel will read."""
    if index is None:
        return None
    dtype = torch.int32 if name == "offsets" else torch.int64
    if index.dtype != dtype or index.ndim != 1:
        raise ValueError(f"{name} must be {dtype} of one dimension, got {tuple(index.shape)} {index.dtype}")
    return index.contiguous()

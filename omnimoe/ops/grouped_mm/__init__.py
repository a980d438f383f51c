"""The grouped matrix product: every projection of every bank of copies is one call of it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from omnimoe.ops._backends import (
    Implementation,
    choose,
    kernels_first,
    suits_kernels,
    why_not_compiled,
    why_not_cuda,
)
from omnimoe.ops._rows import gathers_first
from omnimoe.ops.adapters import megablocks
from omnimoe.ops.grouped_mm import cpp, cuda, native, pools, reference, slices, triton
from omnimoe.ops.triton import why_not_triton


def grouped_mm(
    x: Tensor,
    weight: Tensor | Sequence[Tensor],
    offsets: Tensor,
    bias: Tensor | Sequence[Tensor] | None = None,
    row_index: Tensor | None = None,
    transposed: bool = False,
) -> Tensor:
    """Multiplies each block of consecutive rows of ``x`` by the matrix of its group.

    With one group a tower this is a modality-untied projection; with one group an expert it is one
    projection of a mixture of experts. Rows past the last offset come out as zeros.

    Args:
        x: ``(R, D)`` floating point, rows in group order; with ``row_index`` ``(T, D)``, rows in any order.
        weight: ``(G, F, D)``, one matrix a group, dtype and device of ``x``; under autocast both are cast. Or a list of
            pools ``(G_p, F_p, D_p)`` of unequal size, each of which owns the groups that follow the last one's: D is
            that of the deepest, and rows of the others are read up to their pool's depth.
        offsets: ``(G,)`` int32, the end of each group's rows, not decreasing, at most ``R``.
            A group may be empty.
        bias: ``(G, F)``, added to the rows of each group; with pools a list of ``(G_p, F_p)``.
        row_index: ``(R,)`` int64, the row of ``x`` that each row in group order is: a gather that is part of the
            product where the implementation can.
        transposed: the matrices lie as ``(G, D, F)``. They are not copied.

    Returns:
        ``(R, F)`` in the dtype of ``x`` (under autocast, of autocast); sums are taken in float32, or in float64 for it.
        With pools F is that of the widest, and columns past a row's own pool are zeros: so the shape depends on no
        offset, and the result of one product is the operand of the next.

    Raises:
        ValueError: if ``x`` and ``weight`` differ in ``D``, or ``offsets`` is not ``(G,)`` int32; on the
            CPU also if it decreases or ends beyond ``R``.

    Source: the grouped GEMM of MegaBlocks, https://arxiv.org/abs/2211.15841.

    Example:
        >>> weight = torch.stack([torch.eye(2), 2 * torch.eye(2)])
        >>> grouped_mm(torch.ones(2, 2), weight, torch.tensor([1, 2], dtype=torch.int32)).tolist()
        [[1.0, 1.0], [2.0, 2.0]]
        >>> pools = [torch.ones(1, 3, 2), torch.ones(1, 1, 2)]
        >>> grouped_mm(torch.ones(2, 2), pools, torch.tensor([1, 2], dtype=torch.int32)).tolist()
        [[2.0, 2.0, 2.0], [2.0, 0.0, 0.0]]
    """
    if not isinstance(weight, Tensor):
        if isinstance(bias, Tensor):
            raise ValueError(f"pools take a bias each, in a list, got one of {tuple(bias.shape)}")
        matrices = [pool.transpose(1, 2) for pool in weight] if transposed else list(weight)
        return pools.grouped_mm(grouped_mm, x, matrices, offsets, bias, row_index)
    weight = weight.transpose(-2, -1) if transposed else weight
    if x.ndim != 2 or weight.ndim != 3 or x.shape[1] != weight.shape[2]:
        raise ValueError(f"x must be (R, D) and weight (G, F, D), got {tuple(x.shape)} and {tuple(weight.shape)}")
    if offsets.dtype != torch.int32 or offsets.shape != weight.shape[:1]:
        raise ValueError(
            f"offsets must be ({weight.shape[0]},) int32, one end a group, got {tuple(offsets.shape)} {offsets.dtype}"
        )
    if bias is not None and (not isinstance(bias, Tensor) or bias.shape != weight.shape[:2]):
        told = tuple(bias.shape) if isinstance(bias, Tensor) else f"a list of {len(bias)}"
        raise ValueError(f"bias must be {tuple(weight.shape[:2])}, got {told}")
    if row_index is not None and row_index.ndim != 1:
        raise ValueError(f"row_index must be (R,), got {tuple(row_index.shape)}")
    kind = x.device.type
    if torch.is_autocast_enabled(kind):
        dtype = torch.get_autocast_dtype(kind)
        x, weight, bias = x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
    if x.dtype != weight.dtype:
        raise ValueError(f"x and weight must share a dtype, got {x.dtype} and {weight.dtype}; cast one of them")
    order = IMPLEMENTATIONS if native.is_one_kernel(x) and not suits_kernels(x, is_bank=True) else KERNELS_FIRST
    call = choose("grouped_mm", order, x, weight, offsets, bias, row_index)
    return call(x, weight, offsets, bias, row_index)


def _why_not_torch(x: Tensor, weight: Tensor, *rest: Tensor | None) -> str:
    if x.device.type == "cuda":
        return native.why_not(x, weight)
    if x.device.type != "cpu":
        return f"x is on {x.device}"
    if torch.compiler.is_compiling():
        return "its slices are read from the offsets, which a traced graph cannot do"
    return ""


def _torch(x: Tensor, weight: Tensor, offsets: Tensor, bias: Tensor | None) -> Tensor:
    return (native if x.device.type == "cuda" else slices).grouped_mm(x, weight, offsets, bias)


IMPLEMENTATIONS = (
    Implementation("torch", gathers_first(_torch), _why_not_torch),
    Implementation("cpp", cpp.grouped_mm, why_not_compiled),
    Implementation("cuda", cuda.grouped_mm, why_not_cuda),
    Implementation("triton", triton.grouped_mm, why_not_triton),
    Implementation("reference", reference.grouped_mm),
    Implementation("megablocks", gathers_first(megablocks.grouped_mm), megablocks.why_not_product, is_foreign=True),
)
"""On CUDA PyTorch's product comes first; no kernel of ours was timed beside it, or on any GPU."""
KERNELS_FIRST = kernels_first(IMPLEMENTATIONS)
"""On CUDA where PyTorch's product is a loop over groups that waits for the offsets, which no CUDA graph can hold; on a
CPU under ``no_grad``."""

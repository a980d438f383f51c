"""``grouped_gemm.backend``: the product alone, with both transpositions and a place for the result."""

from __future__ import annotations

import torch
from torch import Tensor

from omnimoe.ops.grouped_mm import grouped_mm
from omnimoe.ops.grouped_wgrad import grouped_wgrad


def gmm(
    a: Tensor,
    b: Tensor,
    batch_sizes: Tensor,
    trans_a: bool = False,
    trans_b: bool = False,
    c: Tensor | None = None,
) -> Tensor:
    """Multiplies each block of consecutive rows of ``a`` by its own matrix, or by its own rows of ``b``.

    Args:
        a: ``(R, K)``, rows in group order.
        b: ``(G, K, N)``; with ``trans_b`` ``(G, N, K)``; with ``trans_a`` ``(R, N)``.
        batch_sizes: ``(G,)`` int64 or int32, the number of rows of each group, on the CPU or the device of ``a``.
        trans_a: gives ``a_g^T b_g`` of each group, which is the gradient of a bank.
        trans_b: whether the matrices of ``b`` are transposed.
        c: where the result goes, of its shape.

    Returns:
        ``(R, N)``, or ``(G, K, N)`` with ``trans_a``; ``c`` where it was given. A group without rows gives zeros.

    Raises:
        ValueError: if the shapes do not fit, or both are to be transposed.
    """
    if trans_a and trans_b:
        raise ValueError("gmm transposes a or b, not both")
    if batch_sizes.ndim != 1 or batch_sizes.dtype not in (torch.int64, torch.int32):
        raise ValueError(f"batch_sizes must be (G,) int64, got {tuple(batch_sizes.shape)} {batch_sizes.dtype}")
    if a.ndim != 2 or b.ndim != (2 if trans_a else 3):
        wanted = "(R, K) and (R, N)" if trans_a else "(R, K) and three-dimensional"
        raise ValueError(f"a and b must be {wanted}, got {tuple(a.shape)} and {tuple(b.shape)}")
    offsets = batch_sizes.cumsum(0).to(device=a.device, dtype=torch.int32, non_blocking=True)
    found = grouped_wgrad(a, b, offsets) if trans_a else grouped_mm(a, b, offsets, transposed=not trans_b)
    if c is None:
        return found
    if c.shape != found.shape:
        raise ValueError(f"c must be {tuple(found.shape)}, got {tuple(c.shape)}")
    return c.copy_(found)

"""The weighted sum that ends a routed layer."""

from __future__ import annotations

from torch import Tensor

from omnimoe.ops._backends import Implementation, choose, why_not_compiled, why_not_cuda
from omnimoe.ops.combine import cpp, cuda, reference, triton
from omnimoe.ops.triton import why_not_triton


def combine(y: Tensor, token_index: Tensor, weights: Tensor, num_rows: int) -> Tensor:
    """Adds each routed row, times its weight, to the row it came from; the gradient is a gather.

    Args:
        y: ``(R, D)``, what the experts made of the routed rows.
        token_index: ``(R,)`` int64, the row each came from.
        weights: ``(R,)`` floating point.
        num_rows: N.

    Returns:
        ``(N, D)`` in the dtype of ``y``; products and sums are taken in float32 (float64 for it) and rounded once. A
        row that no expert took is zero.

    Raises:
        ValueError: if there is not one token and one weight for each row.

    Example:
        >>> import torch
        >>> y = torch.tensor([[1.0], [2.0], [4.0]])
        >>> combine(y, torch.tensor([1, 0, 1]), torch.tensor([1.0, 1.0, 0.5]), 2).tolist()
        [[2.0], [3.0]]
    """
    if y.ndim != 2 or token_index.shape != y.shape[:1] or weights.shape != y.shape[:1]:
        raise ValueError(
            f"y must be (R, D), token_index and weights (R,), got {tuple(y.shape)}, {tuple(token_index.shape)} and "
            f"{tuple(weights.shape)}"
        )
    call = choose("combine", IMPLEMENTATIONS, y, token_index, weights)
    return call(y, token_index, weights, num_rows)


IMPLEMENTATIONS = (
    Implementation("cpp", cpp.combine, why_not_compiled),
    Implementation("cuda", cuda.combine, why_not_cuda),
    Implementation("triton", triton.combine, why_not_triton),
    Implementation("torch", reference.combine),
    Implementation("reference", reference.combine),
)
"""On CUDA the sums of PyTorch's are added in no fixed order, so kernels come first."""

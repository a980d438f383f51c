"""RMS normalisation with a bank of scales."""

from __future__ import annotations

from torch import Tensor

from omnimoe.ops._backends import Implementation, choose, why_not_compiled
from omnimoe.ops.rms_norm import cpp, reference, slices


def rms_norm(x: Tensor, weight: Tensor, offsets: Tensor | None = None, eps: float = 1e-5) -> Tensor:
    """Divides each row by its root mean square and scales it by the weight of its group.

    Args:
        x: ``(R, ..., D)`` floating point, rows in group order.
        weight: ``(G, D)``.
        offsets: ``(G,)`` int32, the end of each group's rows; None with one group.
        eps: added to the mean square.

    Returns:
        The shape and dtype of ``x``; statistics in float32 (float64 for it). Rows past the last offset are zeros.

    Raises:
        ValueError: if the widths differ or several groups come without offsets.

    Source: https://arxiv.org/abs/1910.07467.
    """
    if weight.ndim != 2 or weight.shape[1] != x.shape[-1]:
        raise ValueError(f"weight must be (G, {x.shape[-1]}), got {tuple(weight.shape)}")
    if offsets is None and weight.shape[0] != 1:
        raise ValueError(f"{weight.shape[0]} groups need offsets, the end of each group's rows")
    return choose("rms_norm", IMPLEMENTATIONS, x, weight, offsets)(x, weight, offsets, eps)


def _why_not_slices(x: Tensor, *rest: Tensor | None) -> str:
    return "" if x.device.type == "cpu" else f"x is on {x.device}"


IMPLEMENTATIONS = (
    Implementation("cpp", cpp.rms_norm, why_not_compiled),
    Implementation("torch", slices.rms_norm, _why_not_slices),
    Implementation("reference", reference.rms_norm),
)

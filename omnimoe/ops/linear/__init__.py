"""One matrix for all rows: the head, and a bank of one copy."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from omnimoe.ops._backends import Implementation, choose, kernels_first, suits_kernels, why_not_compiled
from omnimoe.ops.linear import cpp


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``x @ weight.T + bias``, which is ``torch.nn.functional.linear`` wherever gradients are recorded.

    Args:
        x: ``(..., D)`` floating point.
        weight: ``(F, D)``, of any kind that PyTorch's takes: split over devices, quantised.
        bias: ``(F,)``.

    Returns:
        ``(..., F)`` in the dtype of ``x`` (under autocast, of autocast).

    Raises:
        RuntimeError: PyTorch's own, if the shapes do not fit.

    Example:
        >>> linear(torch.ones(1, 2), torch.eye(2)).tolist()
        [[1.0, 1.0]]
    """
    order = KERNELS_FIRST if suits_kernels(x) else IMPLEMENTATIONS
    return choose("linear", order, x, weight, bias)(x, weight, bias)


def _why_not_cpp(x: Tensor, weight: Tensor, bias: Tensor | None) -> str:
    if torch.compiler.is_compiling():
        return "a traced graph is given PyTorch's product, which its compiler can fuse"
    if torch.is_autocast_enabled(x.device.type):
        return "autocast knows PyTorch's product alone"
    if any(held is not None and type(held) not in (Tensor, torch.nn.Parameter) for held in (x, weight, bias)):
        return "an operand is no plain tensor"
    if weight.dtype != x.dtype or weight.ndim != 2 or weight.shape[1] != x.shape[-1]:
        return f"x {tuple(x.shape)} {x.dtype} does not fit weight {tuple(weight.shape)} {weight.dtype}"
    return why_not_compiled(x, weight, bias)


IMPLEMENTATIONS = (
    Implementation("torch", F.linear),
    Implementation("cpp", cpp.linear, _why_not_cpp),
    Implementation("reference", F.linear),
)
KERNELS_FIRST = kernels_first(IMPLEMENTATIONS)
"""On a CPU under ``no_grad``: the head of a decoded token is mostly the reading of its weights."""

"""Rotary position embedding."""

from __future__ import annotations

import torch
from torch import Tensor

from omnimoe.ops._backends import Implementation, choose, why_not_compiled
from omnimoe.ops.rope import cpp, reference


def rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotates the pairs ``(i, i + C/2)`` of every head by the row's angles.

    Args:
        x: ``(N, H, C)`` floating point.
        cos: ``(N, C/2)`` float32, cosine of the angle of each pair.
        sin: ``(N, C/2)`` float32.

    Returns:
        The shape and dtype of ``x``.

    Raises:
        ValueError: if ``cos`` or ``sin`` is not ``(N, C/2)``.

    Source: https://arxiv.org/abs/2104.09864, in the half-split form of the Llama family.
    """
    if cos.shape != (x.shape[0], x.shape[-1] // 2) or sin.shape != cos.shape:
        raise ValueError(
            f"cos and sin must be ({x.shape[0]}, {x.shape[-1] // 2}), got {tuple(cos.shape)} and {tuple(sin.shape)}"
        )
    return choose("rope", IMPLEMENTATIONS, x, cos, sin)(x, cos, sin)


def _why_not_kernel(x: Tensor, cos: Tensor, sin: Tensor) -> str:
    if cos.requires_grad or sin.requires_grad:
        return "a table needs a gradient"
    if torch.compiler.is_compiling():
        return "a traced graph makes one kernel of it by itself"
    return why_not_compiled(x, cos, sin)


IMPLEMENTATIONS = (
    Implementation("cpp", cpp.rope, _why_not_kernel),
    Implementation("torch", reference.rope),
    Implementation("reference", reference.rope),
)

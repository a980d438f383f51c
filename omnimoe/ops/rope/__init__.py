"""Rotary position embedding."""

from __future__ import annotations

import torch
from torch import Tensor


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
    cos, sin = cos.to(x.dtype).unsqueeze(1), sin.to(x.dtype).unsqueeze(1)
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)

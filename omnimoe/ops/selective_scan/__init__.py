"""The scan of a selective state space: a linear recurrence in time whose decay and input depend on the token."""

from __future__ import annotations

import torch
from torch import Tensor

from omnimoe.ops._backends import Implementation, choose, why_not_compiled
from omnimoe.ops.adapters._packages import missing_mamba
from omnimoe.ops.selective_scan import chunked, cpp, library, reference


def selective_scan(
    x: Tensor,
    step: Tensor,
    rate: Tensor,
    into: Tensor,
    out: Tensor,
    state: Tensor | None = None,
    starts: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Runs ``h = exp(step * rate) * h + step * x * into`` through time and reads ``y = sum(h * out)``.

    Every channel of ``I`` has a state of ``S`` numbers. Where ``step`` is 0 the state stays as it is, so padding is a
    step of 0.

    Args:
        x: ``(B, T, I)`` floating point, what enters each channel.
        step: ``(B, T, I)``, how far each channel moves, at least 0.
        rate: ``(I, S)``, below 0.
        into: ``(B, T, S)``, how a token writes.
        out: ``(B, T, S)``, how it reads.
        state: ``(B, I, S)``, what came before; zeros where None.
        starts: ``(B, T)`` bool, positions before which the state is forgotten; None for none.

    Returns:
        ``(B, T, I)`` in the dtype of ``x``, and the last state ``(B, I, S)``; sums are taken in float32 (float64 for
        it), which is also the dtype of the state.

    Raises:
        ValueError: if shapes do not fit.

    Source: Mamba, https://arxiv.org/abs/2312.00752.

    Example:
        >>> one = torch.ones(1, 3, 1)
        >>> y, state = selective_scan(one, one, -torch.log(torch.tensor([[2.0]])), one, one)
        >>> y.flatten().tolist(), state.item()
        ([1.0, 1.5, 1.75], 1.75)
    """
    batch_size, length, channels = x.shape
    size = rate.shape[-1]
    wanted = {
        "step": (step, (batch_size, length, channels)),
        "rate": (rate, (channels, size)),
        "into": (into, (batch_size, length, size)),
        "out": (out, (batch_size, length, size)),
        "state": (state, (batch_size, channels, size)),
        "starts": (starts, (batch_size, length)),
    }
    for name, (given, shape) in wanted.items():
        if given is not None and given.shape != shape:
            raise ValueError(f"{name} must be {shape} for x {tuple(x.shape)}, got {tuple(given.shape)}")
    wide = torch.promote_types(x.dtype, torch.float32)
    operands = tuple(part.to(wide) for part in (x, step, rate, into, out))
    state = None if state is None else state.to(wide)
    y, last = choose("selective_scan", IMPLEMENTATIONS, *operands, state, starts)(*operands, state, starts)
    return y.to(x.dtype), last


def _why_not_kernel(x: Tensor, *operands: Tensor | None) -> str:
    return why_not_compiled(x, *(part for part in operands if part is not None and part.is_floating_point()))


def _why_not_library(x: Tensor, *operands: Tensor | None) -> str:
    if reason := missing_mamba():
        return reason
    if x.device.type != "cuda" or x.dtype != torch.float32:
        return f"it takes float32 on CUDA, not {x.dtype} on {x.device}"
    if operands[-1] is not None or operands[-2] is not None:
        return "it begins with no state and forgets none on the way"
    return "" if x.numel() else "there is nothing to scan"


IMPLEMENTATIONS = (
    Implementation("mamba_ssm", library.selective_scan, _why_not_library),
    Implementation("cpp", cpp.selective_scan, _why_not_kernel),
    Implementation("torch", chunked.selective_scan),
    Implementation("reference", reference.selective_scan),
)

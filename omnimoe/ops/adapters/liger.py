"""Liger-Kernel's fused experts: one Triton kernel for gather, gate, up and SiLU, SonicMoE's backward.

Liger takes ``(T, K)`` experts and weights of tokens. Rows that are not so many for every token, and rows past the last
offset, go through it as tokens of one expert each, gathered before and summed after by ours.

Its values and gradients were compared with ours in Triton's interpreter alone, not on a GPU. On one, Triton may round
its float32 products to TF32; and the gradient of the weights is added up by atomics, so its last bits may differ from
run to run.

Source: https://github.com/linkedin/Liger-Kernel, ``LigerFusedMoEFunction`` of 0.8.5.
"""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor

from omnimoe.ops._backends import BackendError
from omnimoe.ops._rows import take_rows
from omnimoe.ops.adapters._packages import missing_liger
from omnimoe.ops.adapters._rows import group_of_rows, rows_by_token
from omnimoe.ops.combine import combine

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def why_not_here(x: Tensor, gate_up_proj: Tensor, down_proj: Tensor) -> str:
    """Why it cannot take these tensors; empty where it can."""
    if x.device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        return f"its kernels are for CUDA, and x is on {x.device}"
    if x.dtype not in DTYPES:
        return f"it takes {', '.join(str(dtype).removeprefix('torch.') for dtype in DTYPES)}, not {x.dtype}"
    if gate_up_proj.shape[1] != 2 * down_proj.shape[-1]:
        return "it has no experts without a gate"
    return "it reads the number of its tiles, which a traced graph cannot do" if torch.compiler.is_compiling() else ""


def why_not(x: Tensor, gate_up_proj: Tensor, down_proj: Tensor, *rest: Any) -> str:
    """Why it cannot; empty where it can."""
    return missing_liger() or why_not_here(x, gate_up_proj, down_proj)


def function() -> Any:
    """``LigerFusedMoEFunction``, whose ``apply`` takes x, gate and up, down, ``(T, K)`` int32 experts and weights.

    Raises:
        BackendError: if it cannot be imported.
    """
    try:
        from liger_kernel.ops.fused_moe import LigerFusedMoEFunction
    except ImportError as error:
        raise BackendError(f"liger-kernel is installed but cannot be imported: {error}") from error
    return LigerFusedMoEFunction


def experts_mlp(
    x: Tensor,
    gate_up_proj: Tensor,
    down_proj: Tensor,
    offsets: Tensor,
    activation: str,
    token_index: Tensor | None,
    weights: Tensor | None,
) -> Tensor:
    """See :func:`omnimoe.ops.experts_mlp`.

    Raises:
        BackendError: for another activation than SiLU.
    """
    if activation != "silu":
        raise BackendError(f"backend 'liger' was asked for, but its experts_mlp has SiLU alone, not {activation!r}")
    banks = gate_up_proj, down_proj
    rows = len(x) if token_index is None else len(token_index)
    group = group_of_rows(offsets, rows)
    if token_index is not None:
        by_token = rows_by_token(token_index, offsets, len(x))
        if by_token is not None:
            scale = torch.ones_like(by_token, dtype=x.dtype) if weights is None else weights[by_token]
            return function().apply(x, *banks, group[by_token].to(torch.int32), scale)
    inside = (group < len(offsets)).unsqueeze(1)
    # what lies past the end must reach neither a result nor, by its gradient, the banks
    given = torch.where(inside, x if token_index is None else take_rows(x, token_index), x.new_zeros(()))
    expert = group.clamp(max=len(offsets) - 1).to(torch.int32).unsqueeze(1)
    y = function().apply(given, *banks, expert, x.new_ones(rows, 1))
    y = torch.where(inside, y, y.new_zeros(()))
    if token_index is None:
        return y if weights is None else (y * weights.unsqueeze(1)).to(y.dtype)
    return combine(y, token_index, y.new_ones(rows) if weights is None else weights, len(x))

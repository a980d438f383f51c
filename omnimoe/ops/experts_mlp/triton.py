"""Triton's kernels: the gather and the activation are parts of the first product, and all of the second's backward."""

from __future__ import annotations

import torch
from torch import Tensor

from omnimoe.ops.experts_mlp.activations import CODES


def experts_mlp(
    x: Tensor,
    gate_up_proj: Tensor,
    down_proj: Tensor,
    offsets: Tensor,
    activation: str,
    token_index: Tensor | None,
    weights: Tensor | None,
    gate_up_bias: Tensor | None,
    down_bias: Tensor | None,
    interleaved: bool,
    save: str,
) -> Tensor:
    """See :func:`omnimoe.ops.experts_mlp`. Keeps its input and what ``save`` says for backward, nothing else."""
    if weights is not None:
        weights = weights.to(torch.float32)
    operands = x, gate_up_proj, down_proj, offsets, token_index, weights, gate_up_bias, down_bias
    wanted = torch.is_grad_enabled() and any(part is not None and part.requires_grad for part in operands)
    keep = wanted and save == "pre_activation"
    out, _ = torch.ops.omnimoe_triton.experts_mlp(*operands, CODES[activation], interleaved, keep)
    return out

"""Gather, two grouped products, the activation between them, weighted sum: whatever products are at hand."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from omnimoe.ops._backends import asked_backend
from omnimoe.ops.combine import combine
from omnimoe.ops.experts_mlp.activations import ACTIVATIONS, GATED
from omnimoe.ops.experts_mlp.layouts import split_gate
from omnimoe.ops.grouped_mm import grouped_mm


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
    """See :func:`omnimoe.ops.experts_mlp`. Keeps what each of its parts keeps, or with ``save="none"`` its operands."""

    def network(*operands: Any) -> Tensor:
        x, gate_up_proj, down_proj, weights, gate_up_bias, down_bias = operands
        hidden = grouped_mm(x, gate_up_proj, offsets, gate_up_bias, token_index)
        if gate_up_proj.shape[1] == down_proj.shape[-1]:
            hidden = ACTIVATIONS[activation](hidden)
        else:
            hidden = GATED[activation](*split_gate(hidden, interleaved))
        y = grouped_mm(hidden, down_proj, offsets, down_bias)
        if token_index is None:
            return y if weights is None else (y * weights.unsqueeze(1)).to(y.dtype)
        return combine(y, token_index, y.new_ones(len(y)) if weights is None else weights, len(x))

    operands = x, gate_up_proj, down_proj, weights, gate_up_bias, down_bias
    if save == "none" and torch.is_grad_enabled():
        again = asked_backend()

        def repeatable(*operands: Tensor | None) -> Tensor:
            with again():
                return network(*operands)

        return checkpoint(repeatable, *operands, use_reentrant=False, preserve_rng_state=False)
    return network(*operands)

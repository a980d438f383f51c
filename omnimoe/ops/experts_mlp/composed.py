"""Gather, two grouped products, the activation between them, weighted sum: whatever products are at hand."""

from __future__ import annotations

from torch import Tensor

from omnimoe.ops.combine import combine
from omnimoe.ops.experts_mlp.activations import ACTIVATIONS, GATED
from omnimoe.ops.grouped_mm import grouped_mm


def experts_mlp(
    x: Tensor,
    gate_up_proj: Tensor,
    down_proj: Tensor,
    offsets: Tensor,
    activation: str,
    token_index: Tensor | None,
    weights: Tensor | None,
) -> Tensor:
    """See :func:`omnimoe.ops.experts_mlp`."""
    rows = x if token_index is None else x.index_select(0, token_index)
    hidden = grouped_mm(rows, gate_up_proj, offsets)
    if gate_up_proj.shape[1] == down_proj.shape[-1]:
        hidden = ACTIVATIONS[activation](hidden)
    else:
        hidden = GATED[activation](*hidden.chunk(2, dim=-1))
    y = grouped_mm(hidden, down_proj, offsets)
    if token_index is None:
        return y if weights is None else (y * weights.unsqueeze(1)).to(y.dtype)
    return combine(y, token_index, y.new_ones(len(y)) if weights is None else weights, len(x))

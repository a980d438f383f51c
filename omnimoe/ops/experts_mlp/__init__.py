"""The feed-forward networks of a bank, from gathered rows to weighted sums."""

from __future__ import annotations

import torch
from torch import Tensor

from omnimoe.ops._backends import Implementation, choose, why_not_compiled
from omnimoe.ops.adapters import liger, megablocks
from omnimoe.ops.experts_mlp import composed, cpp
from omnimoe.ops.experts_mlp.activations import ACTIVATIONS, GATED

__all__ = ["ACTIVATIONS", "GATED", "experts_mlp"]


def experts_mlp(
    x: Tensor,
    gate_up_proj: Tensor,
    down_proj: Tensor,
    offsets: Tensor,
    activation: str = "silu",
    token_index: Tensor | None = None,
    weights: Tensor | None = None,
) -> Tensor:
    """``down(act(gate(x)) * up(x))`` with the matrices of each row's group; summed by token where rows were routed.

    Args:
        x: ``(R, D)``, rows in group order; with ``token_index`` ``(T, D)``, tokens in any order.
        gate_up_proj: ``(G, 2F, D)``, the gate's rows first; ``(G, F, D)`` for a network without a gate.
        down_proj: ``(G, D, F)``.
        offsets: ``(G,)`` int32, the end of each group's rows.
        activation: a name of :data:`GATED`, or of :data:`ACTIVATIONS` without a gate.
        token_index: ``(R,)`` int64, the token that each routed row is, rows in group order. A token may be routed to
            any number of groups.
        weights: ``(R,)`` floating point, what each row's result counts for.

    Returns:
        ``(R, D)``, rows past the last offset zeros; with ``token_index`` ``(T, D)``, zeros for a token without rows. In
        the dtype of ``x`` (under autocast, of autocast); sums over rows are taken in float32, or float64 for it.

    Raises:
        ValueError: if the widths do not fit, the activation is unknown or needs a gate, or the offsets decrease or pass
            the rows.

    Source: SwiGLU, https://arxiv.org/abs/2002.05202; one op from gather to sum, https://arxiv.org/abs/2512.14080.
    """
    width = down_proj.shape[-1]
    if gate_up_proj.shape[1] not in (width, 2 * width):
        raise ValueError(
            f"gate_up_proj must be (G, {2 * width}, D), or (G, {width}, D) without a gate, "
            f"got {tuple(gate_up_proj.shape)}"
        )
    known = ACTIVATIONS if gate_up_proj.shape[1] == width else GATED
    if activation not in known:
        told = " without a gate" if activation in GATED else ""
        raise ValueError(f"unknown activation {activation!r}{told}; known: {', '.join(known)}")
    rows = len(x) if token_index is None else len(token_index)
    if weights is not None and weights.shape != (rows,):
        raise ValueError(f"weights must be ({rows},), one a row, got {tuple(weights.shape)}")
    kind = x.device.type
    if torch.is_autocast_enabled(kind):
        dtype = torch.get_autocast_dtype(kind)
        x, gate_up_proj, down_proj = x.to(dtype), gate_up_proj.to(dtype), down_proj.to(dtype)
    operands = x, gate_up_proj, down_proj, offsets, token_index, weights
    call = choose("experts_mlp", IMPLEMENTATIONS if token_index is None else ROUTED, *operands)
    return call(x, gate_up_proj, down_proj, offsets, activation, token_index, weights)


def _why_not_composed(*operands: Tensor | None) -> str:
    compiles = torch.compiler.is_compiling() and operands[0] is not None and operands[0].device.type == "cpu"
    return "a traced graph takes one compiled op" if compiles and not why_not_compiled(*operands) else ""


IMPLEMENTATIONS = (
    Implementation("torch", composed.experts_mlp, _why_not_composed),
    Implementation("cpp", cpp.experts_mlp, why_not_compiled),
    Implementation("reference", composed.experts_mlp),
    Implementation("liger", liger.experts_mlp, liger.why_not, is_foreign=True),
    Implementation("megablocks", megablocks.experts_mlp, megablocks.why_not_experts, is_foreign=True),
)
"""For rows that lie in group order, where there are few groups and large ones. ``"reference"`` is the composed form
over reference products."""
ROUTED = (IMPLEMENTATIONS[1], IMPLEMENTATIONS[0], *IMPLEMENTATIONS[2:])
"""For routed rows: many small groups, and a gather and a sum besides."""

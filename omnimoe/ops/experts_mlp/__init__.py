"""The feed-forward networks of a bank, from gathered rows to weighted sums."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from omnimoe.ops._backends import (
    Implementation,
    choose,
    kernels_first,
    suits_kernels,
    why_not_compiled,
    why_not_cuda,
)
from omnimoe.ops.adapters import liger, megablocks
from omnimoe.ops.experts_mlp import composed, pools
from omnimoe.ops.experts_mlp.activations import ACTIVATIONS, GATED
from omnimoe.ops.experts_mlp.fused import fused
from omnimoe.ops.experts_mlp.layouts import KEPT, plain_alone
from omnimoe.ops.triton import why_not_triton

__all__ = ["ACTIVATIONS", "GATED", "experts_mlp"]


def experts_mlp(
    x: Tensor,
    gate_up_proj: Tensor | Sequence[Tensor],
    down_proj: Tensor | Sequence[Tensor],
    offsets: Tensor,
    activation: str = "silu",
    token_index: Tensor | None = None,
    weights: Tensor | None = None,
    *,
    gate_up_bias: Tensor | Sequence[Tensor] | None = None,
    down_bias: Tensor | Sequence[Tensor] | None = None,
    interleaved: bool = False,
    transposed: bool = False,
    save: str = "pre_activation",
) -> Tensor:
    """``down(act(gate(x)) * up(x))`` with the matrices of each row's group; summed by token where rows were routed.

    Args:
        x: ``(R, D)``, rows in group order; with ``token_index`` ``(T, D)``, tokens in any order.
        gate_up_proj: ``(G, 2F, D)``, the gate's rows first; ``(G, F, D)`` for a network without a gate. Or a list of
            pools ``(G_p, 2F_p, D)`` of unequal width, each of which owns the groups that follow the last one's. A token
            with rows in several pools is rounded once for each of them.
        down_proj: ``(G, D, F)``; or as many pools.
        offsets: ``(G,)`` int32, the end of each group's rows.
        activation: a name of :data:`GATED`, or of :data:`ACTIVATIONS` without a gate.
        token_index: ``(R,)`` int64, the token that each routed row is, rows in group order. A token may be routed to
            any number of groups.
        weights: ``(R,)`` floating point, what each row's result counts for.
        gate_up_bias: ``(G, 2F)`` or ``(G, F)``, in the order of ``gate_up_proj``'s rows; with pools a list.
        down_bias: ``(G, D)``, added before a row's result is weighted; with pools a list.
        interleaved: rows of ``gate_up_proj`` are gate and up in turns, as gpt-oss has them, not the gate's first.
        transposed: the matrices lie as ``(G, D, 2F)`` and ``(G, F, D)``. They are not copied.
        save: what backward finds. ``"pre_activation"``: the input and what lies before the activation, ``(R, 2F)``.
            ``"none"``: the input alone; the rest is computed again. The composed form, which serves where no kernel
            is, keeps more for the former.

    Returns:
        ``(R, D)``, rows past the last offset zeros; with ``token_index`` ``(T, D)``, zeros for a token without rows. In
        the dtype of ``x`` (under autocast, of autocast); sums over rows are taken in float32, or float64 for it.

    Raises:
        ValueError: if the widths do not fit, the activation is unknown or needs a gate, or the offsets decrease or pass
            the rows.

    Source: SwiGLU, https://arxiv.org/abs/2002.05202; one op from gather to sum, https://arxiv.org/abs/2512.14080.
    """
    if save not in KEPT:
        raise ValueError(f"unknown save {save!r}; known: {', '.join(KEPT)}")
    if not isinstance(gate_up_proj, Tensor) or not isinstance(down_proj, Tensor):
        options = {"interleaved": interleaved, "transposed": transposed, "save": save}
        banks, biases = (gate_up_proj, down_proj), (gate_up_bias, down_bias)
        return pools.experts_mlp(experts_mlp, x, banks, biases, offsets, activation, token_index, weights, options)
    if transposed:
        gate_up_proj, down_proj = gate_up_proj.transpose(-2, -1), down_proj.transpose(-2, -1)
    width = down_proj.shape[-1]
    if gate_up_proj.ndim != 3 or down_proj.ndim != 3 or gate_up_proj.shape[1] not in (width, 2 * width):
        raise ValueError(
            f"gate_up_proj must be (G, {2 * width}, D), or (G, {width}, D) without a gate, "
            f"got {tuple(gate_up_proj.shape)}"
        )
    groups, _, hidden = gate_up_proj.shape
    if x.ndim != 2 or x.shape[1] != hidden or down_proj.shape[:2] != (groups, hidden):
        raise ValueError(
            f"x must be (R, {hidden}) and down_proj ({groups}, {hidden}, F) beside a gate_up_proj of "
            f"{tuple(gate_up_proj.shape)}, got {tuple(x.shape)} and {tuple(down_proj.shape)}"
        )
    is_gated = gate_up_proj.shape[1] != width
    known = GATED if is_gated else ACTIVATIONS
    if activation not in known:
        told = " without a gate" if activation in GATED else ""
        raise ValueError(f"unknown activation {activation!r}{told}; known: {', '.join(known)}")
    if interleaved and not is_gated:
        raise ValueError(f"without a gate nothing is interleaved; gate_up_proj is {tuple(gate_up_proj.shape)}")
    rows = len(x) if token_index is None else len(token_index)
    if weights is not None and weights.shape != (rows,):
        raise ValueError(f"weights must be ({rows},), one a row, got {tuple(weights.shape)}")
    biases = _bias("gate_up_bias", gate_up_bias, gate_up_proj), _bias("down_bias", down_bias, down_proj)
    kind = x.device.type
    if torch.is_autocast_enabled(kind):
        dtype = torch.get_autocast_dtype(kind)
        x, gate_up_proj, down_proj = x.to(dtype), gate_up_proj.to(dtype), down_proj.to(dtype)
        into, out = biases
        biases = None if into is None else into.to(dtype), None if out is None else out.to(dtype)
    operands = x, gate_up_proj, down_proj, offsets, token_index, weights, *biases, interleaved
    order = IMPLEMENTATIONS if token_index is None and not suits_kernels(x, is_bank=True) else KERNELS_FIRST
    call = choose("experts_mlp", order, *operands)
    return call(x, gate_up_proj, down_proj, offsets, activation, token_index, weights, *biases, interleaved, save)


def _bias(name: str, bias: Tensor | Sequence[Tensor] | None, bank: Tensor) -> Tensor | None:
    if bias is None or (isinstance(bias, Tensor) and bias.shape == bank.shape[:2]):
        return bias
    told = tuple(bias.shape) if isinstance(bias, Tensor) else f"a list of {len(bias)}"
    raise ValueError(f"{name} must be {tuple(bank.shape[:2])}, got {told}")


def _why_not_composed(*operands: Any) -> str:
    compiles = torch.compiler.is_compiling() and operands[0] is not None and operands[0].device.type == "cpu"
    return "a traced graph takes one compiled op" if compiles and not why_not_compiled(*operands) else ""


IMPLEMENTATIONS = (
    Implementation("torch", composed.experts_mlp, _why_not_composed),
    Implementation("cpp", fused("omnimoe", checks_offsets=True), why_not_compiled),
    Implementation("cuda", fused("omnimoe"), why_not_cuda),
    Implementation("triton", fused("omnimoe_triton"), why_not_triton),
    Implementation("reference", composed.experts_mlp),
    Implementation("liger", plain_alone("liger", liger.experts_mlp), liger.why_not, is_foreign=True),
    Implementation(
        "megablocks", plain_alone("megablocks", megablocks.experts_mlp), megablocks.why_not_experts, is_foreign=True
    ),
)
"""For rows that lie in group order, where there are few groups and large ones. ``"reference"`` is the composed form
over reference products."""
KERNELS_FIRST = kernels_first(IMPLEMENTATIONS)
"""For routed rows, many small groups with a gather and a sum besides, and on a CPU under ``no_grad``. On
CUDA the compiled kernels and then Triton's come before the composed form, for what they need not keep or write, and
because their sums are repeatable; none was timed on a GPU."""

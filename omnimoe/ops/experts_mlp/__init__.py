"""The feed-forward network of a bank of copies, over rows in group order."""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor

from omnimoe.ops.grouped_mm import grouped_mm

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
    "relu2": lambda x: F.relu(x).square(),
}
"""Names of activation functions, as configs write them."""


def experts_mlp(
    x: Tensor,
    gate_up_proj: Tensor,
    down_proj: Tensor,
    offsets: Tensor,
    activation: str = "silu",
) -> Tensor:
    """``down(act(gate(x)) * up(x))`` with the matrices of each row's group.

    Args:
        x: ``(R, D)``, rows in group order.
        gate_up_proj: ``(G, 2F, D)``, the gate's rows first; ``(G, F, D)`` for a network without a gate.
        down_proj: ``(G, D, F)``.
        offsets: ``(G,)`` int32, the end of each group's rows.
        activation: a name of :data:`ACTIVATIONS`.

    Returns:
        ``(R, D)``; rows past the last offset are zeros.

    Raises:
        ValueError: if the widths do not fit or the activation is unknown.

    Source: SwiGLU, https://arxiv.org/abs/2002.05202.
    """
    if activation not in ACTIVATIONS:
        raise ValueError(f"unknown activation {activation!r}; known: {', '.join(ACTIVATIONS)}")
    width = down_proj.shape[-1]
    if gate_up_proj.shape[1] not in (width, 2 * width):
        raise ValueError(
            f"gate_up_proj must be (G, {2 * width}, D), or (G, {width}, D) without a gate, "
            f"got {tuple(gate_up_proj.shape)}"
        )
    hidden = grouped_mm(x, gate_up_proj, offsets)
    if gate_up_proj.shape[1] == width:
        hidden = ACTIVATIONS[activation](hidden)
    else:
        gate, up = hidden.chunk(2, dim=-1)
        hidden = ACTIVATIONS[activation](gate) * up
    return grouped_mm(hidden, down_proj, offsets)

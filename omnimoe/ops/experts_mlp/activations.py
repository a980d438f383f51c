"""Activation functions by the names that configs write."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
    "relu2": lambda x: F.relu(x).square(),
}
"""Of one argument: what stands between the two products of a network without a gate, or on the gate."""

CLAMP_LIMIT = 7.0
CLAMP_SLOPE = 1.702


def clamped_silu(gate: Tensor, up: Tensor) -> Tensor:
    """gpt-oss's gate: both sides are clamped, and one is added to the right one.

    Source: https://arxiv.org/abs/2508.10925.
    """
    gate, up = gate.clamp(max=CLAMP_LIMIT), up.clamp(-CLAMP_LIMIT, CLAMP_LIMIT)
    return gate * torch.sigmoid(CLAMP_SLOPE * gate) * (up + 1)


def _times_up(activation: Callable[[Tensor], Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda gate, up: activation(gate) * up


GATED: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    **{name: _times_up(activation) for name, activation in ACTIVATIONS.items()},
    "clamped_silu": clamped_silu,
}
"""Of gate and up."""

CODES = {name: code for code, name in enumerate(("silu", "gelu", "gelu_tanh", "relu", "relu2", "clamped_silu"))}
"""Numbers of the compiled kernels."""

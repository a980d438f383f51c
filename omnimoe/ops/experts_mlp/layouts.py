"""How gate and up share a bank, and what is kept for backward."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from torch import Tensor

from omnimoe.ops._backends import BackendError

KEPT = ("pre_activation", "none")
"""What ``save`` may say."""


def split_gate(hidden: Tensor, interleaved: bool) -> tuple[Tensor, Tensor]:
    """Gate and up ``(R, F)`` of ``hidden (R, 2F)``: its halves, or every other column."""
    if interleaved:
        return hidden[:, 0::2], hidden[:, 1::2]
    gate, up = hidden.chunk(2, dim=-1)
    return gate, up


def plain_alone(name: str, call: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """For a network of another library that has the plain layout alone.

    Args:
        name: of the backend, for the message.
        call: takes the operands up to ``weights``.

    Returns:
        What takes all operands, and raises BackendError where one of the others is given.
    """

    @functools.wraps(call)
    def checked(*operands: Any) -> Tensor:
        plain, (gate_up_bias, down_bias, interleaved, save) = operands[:-4], operands[-4:]
        reasons = {
            "biases": gate_up_bias is not None or down_bias is not None,
            "interleaved gates": interleaved,
            f"save={save!r}": save != KEPT[0],
        }
        found = [reason for reason, holds in reasons.items() if holds]
        if found:
            raise BackendError(f"backend {name!r} was asked for, but its experts_mlp has no {' and no '.join(found)}")
        return call(*plain)

    return checked

"""The linear layer of a learned router, and the score functions over its logits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from omnimoe.config import ConfigError

SCORES: dict[str, Callable[[Tensor], Tensor]] = {
    "softmax": lambda logits: torch.softmax(logits, dim=-1),
    "sigmoid": torch.sigmoid,
    "sqrt_softplus": lambda logits: F.softplus(logits).sqrt(),
}
"""Score functions, ``(N, E)`` float32 logits to ``(N, E)`` scores; the last is DeepSeek-V4's."""


def check_score(score: str) -> None:
    """Refuses an unknown score function.

    Raises:
        ConfigError: with the name and those known.
    """
    if score not in SCORES:
        raise ConfigError(f"unknown score {score!r}; known: {', '.join(SCORES)}")


def shares(scores: Tensor, score: str) -> Tensor:
    """Scores of a row made to sum to one, as the balance losses want them."""
    if score == "softmax":
        return scores
    return scores / scores.sum(-1, keepdim=True).clamp_min(torch.finfo(scores.dtype).tiny)


class Scorer(nn.Module):
    """Router logits of every row, in float32 whatever the model's dtype.

    Args:
        hidden_size: D.
        num_experts: E.
        bias: add a learned number to each expert's logit.
        keep_float32: keep the weights in float32 too, whatever the model is built in or cast to.
    """

    initial = {"weight": "normal", "bias": 0.0}

    def __init__(self, hidden_size: int, num_experts: int, bias: bool = False, keep_float32: bool = False) -> None:
        super().__init__()
        self.keep_float32 = keep_float32
        dtype = torch.float32 if keep_float32 else None
        self.weight = nn.Parameter(torch.empty(num_experts, hidden_size, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(num_experts, dtype=dtype)) if bias else None
        self.reset_parameters()

    def _apply(self, fn: Callable, recurse: bool = True) -> Self:
        if not self.keep_float32:
            return super()._apply(fn, recurse)

        def moved(tensor: Tensor) -> Tensor:
            given = fn(tensor)
            # through the dtype of the cast the weights would come back rounded
            return tensor.to(given.device) if given.is_floating_point() and given.dtype != tensor.dtype else given

        return super()._apply(moved, recurse)

    def reset_parameters(self, std: float = 0.02) -> None:
        """A small normal start; a bias starts at zero."""
        nn.init.normal_(self.weight, std=std)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        """``(N, D)`` to ``(N, E)`` float32."""
        with torch.autocast(x.device.type, enabled=False):
            bias = None if self.bias is None else self.bias.float()
            return F.linear(x.float(), self.weight.float(), bias)

"""The linear layer of a learned router, and the score functions over its logits."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

SCORES: dict[str, Callable[[Tensor], Tensor]] = {
    "softmax": lambda logits: torch.softmax(logits, dim=-1),
    "sigmoid": torch.sigmoid,
}
"""Score functions, ``(N, E)`` float32 logits to ``(N, E)`` scores."""


class Scorer(nn.Module):
    """Router logits of every row, in float32 whatever the model's dtype.

    Args:
        hidden_size: D.
        num_experts: E.
    """

    initial = {"weight": "normal"}

    def __init__(self, hidden_size: int, num_experts: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_experts, hidden_size))
        self.reset_parameters()

    def reset_parameters(self, std: float = 0.02) -> None:
        """A small normal start."""
        nn.init.normal_(self.weight, std=std)

    def forward(self, x: Tensor) -> Tensor:
        """``(N, D)`` to ``(N, E)`` float32."""
        with torch.autocast(x.device.type, enabled=False):
            return F.linear(x.float(), self.weight.float())

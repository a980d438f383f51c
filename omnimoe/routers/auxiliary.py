"""Auxiliary routers: small networks that foretell, from a row alone, what a choice among all rows will be (MoMa).

One stands beside every router whose choice looks at other rows. It says which rows are taken where a row may not look
at others; what a taken row weighs stays the main router's score.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from omnimoe.routers.scores import Scorer


class _ZeroScorer(Scorer):
    """A scorer that says nothing until it is trained."""

    initial = {"weight": 0.0, "bias": 0.0}

    def reset_parameters(self, std: float = 0.0) -> None:
        super().reset_parameters(std)


class AuxiliaryRouter(nn.Module):
    """Foretells from a row alone which choices take it: two matrices, a SiLU and a threshold, in float32.

    The last matrix starts at zero, so that one which was never trained takes no row, and can be told.

    Args:
        hidden_size: D.
        num_choices: E, the experts of a group, or 1 for a layer.

    Source: MoMa, https://arxiv.org/abs/2407.21770, section 3.4; the start at zero and the bias, which moves the
    threshold of one half, are ours.
    """

    def __init__(self, hidden_size: int, num_choices: int) -> None:
        super().__init__()
        self.inner = Scorer(hidden_size, hidden_size // 2)
        self.outer = _ZeroScorer(hidden_size // 2, num_choices, bias=True)

    @staticmethod
    def num_params(hidden_size: int, num_choices: int) -> int:
        """Weights of one, for counting."""
        return (hidden_size // 2) * (hidden_size + num_choices) + num_choices

    @property
    def is_trained(self) -> bool:
        """Whether any training step moved it; read back to the host."""
        return bool(self.outer.weight.detach().any())

    def drop_bias(self) -> None:
        """Leaves the threshold at one half for good, as MoMa has it: a bias of zero, which is not trained."""
        assert self.outer.bias is not None
        nn.init.zeros_(self.outer.bias.requires_grad_(False))

    def forward(self, x: Tensor) -> Tensor:
        """``(N, D)`` to ``(N, E)`` float32, the logit of each choice."""
        return self.outer(F.silu(self.inner(x)))

    def takes(self, x: Tensor) -> Tensor:
        """``(N, D)`` to ``(N, E)`` bool: the choices more likely than not."""
        return self(x) > 0

    def loss(self, x: Tensor, chosen: Tensor, counted: Tensor | None = None) -> Tensor:
        """Mean binary cross-entropy, which moves the auxiliary router alone.

        Args:
            x: ``(N, D)``, what the main router saw.
            chosen: ``(N, E)`` float32, 1 where the main router chose.
            counted: ``(N,)`` bool, the rows that count; None for all.
        """
        each = F.binary_cross_entropy_with_logits(self(x.detach()), chosen, reduction="none").mean(-1)
        present = torch.ones_like(each) if counted is None else counted.to(each.dtype)
        return (each * present).sum() / present.sum().clamp_min(1)

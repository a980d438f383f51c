"""The feed-forward bank, in the parameter layout that the ecosystem reads."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from omnimoe.layers.bank import Bank, plain
from omnimoe.ops import experts_mlp


class BankMLP(Bank):
    """Copies of a gated feed-forward network: SwiGLU with the default activation.

    Args:
        num_copies: G; which copy a row meets is decided outside.
        hidden_size: D.
        intermediate_size: F.
        activation: a name of ``omnimoe.ops.ACTIVATIONS``.
        gated: multiply by the activated gate; without it the network has two matrices.
        bias: add a bias after each product.
    """

    initial = {"gate_up_proj": "normal", "down_proj": "normal", "gate_up_bias": 0.0, "down_bias": 0.0}

    def __init__(
        self,
        num_copies: int,
        hidden_size: int,
        intermediate_size: int,
        activation: str = "silu",
        gated: bool = True,
        bias: bool = False,
    ) -> None:
        super().__init__(tuple(range(num_copies)))
        self.activation = activation
        rows = (2 if gated else 1) * intermediate_size
        self.gate_up_proj = nn.Parameter(torch.empty(num_copies, rows, hidden_size))
        self.down_proj = nn.Parameter(torch.empty(num_copies, hidden_size, intermediate_size))
        self.gate_up_bias = nn.Parameter(torch.empty(num_copies, rows)) if bias else None
        self.down_bias = nn.Parameter(torch.empty(num_copies, hidden_size)) if bias else None
        self.reset_parameters()

    def forward(
        self,
        x: Tensor,
        offsets: Tensor,
        copies: list[int] | None = None,
        token_index: Tensor | None = None,
        weights: Tensor | None = None,
        compute: Callable | None = None,
    ) -> Tensor:
        """Runs of rows through their copies.

        Args:
            x: ``(R, D)``, rows in runs; with ``token_index`` ``(T, D)``, tokens.
            offsets: ``(S,)`` int32, the end of each run.
            copies: the copy of each run; None where run i meets copy i.
            token_index: ``(R,)`` int64, the token that each row of a run is.
            weights: ``(R,)``, what each row counts for in the sum over the rows of a token.
            compute: does it in the place of our op, ``(bank, x, offsets, token_index, weights)``.

        Returns:
            ``(R, D)``, or ``(T, D)``.
        """
        if compute is not None and self.gate_up_bias is None:
            return compute(self, x, offsets, token_index, weights)
        if compute is not None:
            raise ValueError("experts with biases run on our own ops alone; take set_experts_implementation('omnimoe')")
        biases = {"gate_up_bias": self.gate_up_bias, "down_bias": self.down_bias}
        gate_up_proj, down_proj = self.weights()
        if copies is not None and copies != list(range(self.num_copies)):
            gate_up_proj, down_proj = gate_up_proj[copies], down_proj[copies]
            biases = {name: None if bias is None else bias[copies] for name, bias in biases.items()}
        return experts_mlp(x, gate_up_proj, down_proj, offsets, self.activation, token_index, weights, **biases)

    def weights(self) -> tuple[Tensor, Tensor]:
        """``gate_up_proj`` and ``down_proj`` as operations read them."""
        return plain(self.gate_up_proj), plain(self.down_proj)

    def extra_repr(self) -> str:
        copies, hidden_size, intermediate_size = self.down_proj.shape
        return f"copies={copies}, hidden_size={hidden_size}, intermediate_size={intermediate_size}"

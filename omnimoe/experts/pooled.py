"""Experts of one layer whose widths differ, as those for words and those for pictures do in ERNIE-4.5-VL.

Each pool of equal experts is a bank of its own and takes the experts that follow the last pool's. Rows come sorted by
expert, so what a pool takes is one run of them.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from omnimoe.layers import BankMLP
from omnimoe.ops._pools import Run, runs


class PooledMLP(nn.Module):
    """Pools of gated feed-forward networks, called as one bank of all their copies is.

    Args:
        pools: copies and width F of each pool.
        hidden_size: D.
        activation: a name of ``omnimoe.ops.ACTIVATIONS``.
        gated: multiply by the activated gate.
        bias: add a bias after each product.
    """

    def __init__(
        self,
        pools: tuple[tuple[int, int], ...],
        hidden_size: int,
        activation: str = "silu",
        gated: bool = True,
        bias: bool = False,
    ) -> None:
        super().__init__()
        self.pools = nn.ModuleList(
            BankMLP(count, hidden_size, width, activation, gated, bias) for count, width in pools
        )
        self.counts = tuple(count for count, _ in pools)

    def forward(
        self,
        x: Tensor,
        offsets: Tensor,
        token_index: Tensor | None = None,
        weights: Tensor | None = None,
        compute: Callable | None = None,
    ) -> Tensor:
        """As :meth:`omnimoe.layers.BankMLP.forward`, with the copies of all pools counted on; each gets its own rows.

        Nothing is read back from a device: where offsets may not be read, each pool is shown all rows, of which those
        past its last copy count for nothing.
        """
        num_rows = len(x) if token_index is None else len(token_index)
        parts: list[Tensor] = []
        for pool, run in zip(self.pools, runs(self.counts, offsets, num_rows), strict=True):
            if self._may_rest(pool, run) and (parts or pool is not self.pools[-1]):
                continue
            rows = run.rows if run.place is None else run.place
            each = None if weights is None else weights[rows]
            if token_index is not None:
                parts.append(pool(x, run.offsets, token_index=token_index[rows], weights=each, compute=compute))
            elif run.place is None:
                parts.append(pool(x[rows], run.offsets, weights=each, compute=compute))
            else:
                parts.append(pool(x, run.offsets, token_index=run.place, weights=each, compute=compute))
        if token_index is None and run.place is None:
            rest = num_rows - sum(len(part) for part in parts)
            return torch.cat([*parts, parts[0].new_zeros(rest, parts[0].shape[1])])
        return sum(parts[1:], parts[0])

    @staticmethod
    def _may_rest(pool: nn.Module, run: Run) -> bool:
        """Whether a pool has no rows and nobody waits for it: no gradient, and no other rank."""
        is_empty = run.rows is not None and run.rows.start == run.rows.stop
        return is_empty and not torch.is_grad_enabled() and "forward" not in vars(pool)


__all__ = ["PooledMLP"]

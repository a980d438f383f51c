"""A choice among the rows of all processes: each expert's best, whichever process holds them."""

from __future__ import annotations

from fractions import Fraction

import torch
import torch.distributed as dist
from torch import Tensor

_FINEST = 10_000
LEAST_SHARE = 1 / _FINEST
"""Factors below are taken for nothing."""


def share_of(factor: float, num_experts: int) -> Fraction:
    """An expert's share of the rows, exactly: 0.1 of 80 rows are 8, and open sizes of a graph have no ceiling."""
    return Fraction(factor).limit_denominator(_FINEST) / num_experts


def best_of_ranks(scores: Tensor, counted: Tensor | None, share: Fraction, room: int) -> tuple[Tensor, Tensor]:
    """Which rows each expert takes where the rows of all ranks compete.

    What is exchanged has the same shape at every step. Every rank of the default process group calls this; without one
    the rows at hand are all.

    Args:
        scores: ``(N, E)`` float32; no gradient passes.
        counted: ``(N,)`` bool, the rows that count; None for all.
        share: of all rows, which an expert takes, rounded up.
        room: rows that a rank can hold at most, the same number on every rank.

    Returns:
        ``(N, E)`` bool, and ``(E,)`` float32, the lowest score that each expert took anywhere, NaN where it took none.
    """
    num_rows, num_experts = scores.shape
    # a row more holds how many count, so that nothing is read back to learn it
    table = scores.new_full((room + 1, num_experts), float("-inf"))
    own = scores.detach()
    table[:num_rows] = own if counted is None else own.masked_fill(~counted.unsqueeze(1), float("-inf"))
    table[room] = num_rows if counted is None else counted.sum()
    held, rank = [table], 0
    if dist.is_available() and dist.is_initialized():
        held, rank = [torch.empty_like(table) for _ in range(dist.get_world_size())], dist.get_rank()
        dist.all_gather(held, table)
    tables = torch.stack(held)
    total = tables[:, room, 0].sum().long()
    tables[:, room] = float("-inf")
    capacity = torch.minimum((total * share.numerator + share.denominator - 1) // share.denominator, total)
    everything = tables.view(-1, num_experts)
    ranked, order = everything.sort(dim=0, descending=True, stable=True)
    is_taken = torch.arange(len(everything), device=scores.device).unsqueeze(1) < capacity
    taken = torch.zeros_like(everything, dtype=torch.bool).scatter(0, order, is_taken.expand_as(order))
    cutoff = torch.where(capacity > 0, ranked[(capacity - 1).clamp_min(0)], float("nan"))
    return taken.view_as(tables)[rank, :num_rows], cutoff

"""Capacity: an expert takes so many rows and no more; what finds no room is dropped.

First choices come before second choices. Inside a choice the earlier row comes first, or the surer one, which is batch
priority. So whether a row is dropped depends on others; where ``rows.routes_causally`` forbids that, none is dropped.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from omnimoe.layers import RowLayout
from omnimoe.ops import route_plan

POOLS = ("batch", "sequence")
PRIORITIES = ("position", "score")


def capacity_of(factor: float, top_k: int, num_rows: int | Tensor, num_experts: int) -> int | Tensor:
    """Room of an expert: ``factor`` times its even share of the choices, rounded up. A tensor for rows in a tensor."""
    # a product such as 1.1 * 10 lies a little above the whole number it means
    if isinstance(num_rows, Tensor):
        return (num_rows.double() * (factor * top_k / num_experts) - 1e-9).ceil().long()
    return math.ceil(num_rows * (factor * top_k / num_experts) - 1e-9)


def with_room(
    expert_ids: Tensor, num_experts: int, capacity: int | Tensor, rows: RowLayout, *, pool: str, priority: Tensor | None
) -> Tensor:
    """Which choices find room.

    Args:
        expert_ids: ``(N, K)`` int64, the best first; ids below 0 or from ``num_experts`` on always find room.
        num_experts: E.
        capacity: rows that an expert takes from a pool; ``(B,)`` int64 where it differs by sequence.
        rows: layout of the N rows.
        pool: ``"batch"`` or ``"sequence"``.
        priority: ``(N,)``, larger goes first; None for order in time.

    Returns:
        ``(N, K)`` bool.

    Source: GShard, https://arxiv.org/abs/2006.16668; by score, V-MoE, https://arxiv.org/abs/2106.05974.
    """
    num_rows, top_k = expert_ids.shape
    if priority is not None:
        order = priority.argsort(descending=True, stable=True)
    elif rows.time_index is not None:
        order = rows.time_index.argsort()
    else:
        order = torch.arange(num_rows, device=expert_ids.device)
    ids = expert_ids[order].t().reshape(-1)  # (K * N,), all first choices before all second ones
    limited = (ids >= 0) & (ids < num_experts)
    cells, num_cells = ids, num_experts
    if pool == "sequence":
        sequence = rows.sequence_ids()[order].repeat(top_k)
        cells, num_cells = sequence * num_experts + ids, max(1, rows.batch_size) * num_experts
        if isinstance(capacity, Tensor):
            capacity = capacity[sequence]
    plan = route_plan(torch.where(limited, cells, -1), num_cells)
    starts = torch.nn.functional.pad(plan.offsets[:-1].long(), (1, 0))
    place = plan.inverse - starts[torch.where(limited, cells, 0)]
    fits = (place < capacity) | ~limited
    found = torch.empty_like(expert_ids, dtype=torch.bool)
    found[order] = fits.view(top_k, num_rows).t()
    return found

"""The definition: a stable sort, and where each id would be inserted."""

from __future__ import annotations

import torch
from torch import Tensor


def route_plan(ids: Tensor, num_groups: int) -> tuple[Tensor, Tensor, Tensor]:
    """``(offsets, order, inverse)``; see :func:`omnimoe.ops.route_plan`."""
    ids = torch.where((ids < 0) | (ids >= num_groups), num_groups, ids)
    ids, order = ids.sort(stable=True)
    every = torch.arange(num_groups, device=ids.device)
    offsets = torch.searchsorted(ids, every, right=True).to(torch.int32)
    place = torch.arange(ids.shape[0], device=ids.device)
    return offsets, order, torch.empty_like(order).scatter(0, order, place)

"""Triton's kernels: a radix sort without atomics."""

from __future__ import annotations

import torch
from torch import Tensor


def route_plan(ids: Tensor, num_groups: int) -> tuple[Tensor, Tensor, Tensor]:
    """``(offsets, order, inverse)``; see :func:`omnimoe.ops.route_plan`."""
    return torch.ops.omnimoe_triton.route_plan(ids, num_groups)

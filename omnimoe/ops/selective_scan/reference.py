"""The definition: a loop over time."""

from __future__ import annotations

import torch
from torch import Tensor


def selective_scan(
    x: Tensor, step: Tensor, rate: Tensor, into: Tensor, out: Tensor, state: Tensor | None, starts: Tensor | None
) -> tuple[Tensor, Tensor]:
    """See :func:`omnimoe.ops.selective_scan`; operands of one dtype."""
    if state is None:
        state = x.new_zeros(x.shape[0], *rate.shape)
    read = []
    for time in range(x.shape[1]):
        if starts is not None:
            state = torch.where(starts[:, time, None, None], 0, state)
        moved = step[:, time].unsqueeze(-1)  # (B, I, 1)
        state = torch.exp(moved * rate) * state + moved * x[:, time].unsqueeze(-1) * into[:, time].unsqueeze(1)
        read.append((state * out[:, time].unsqueeze(1)).sum(-1))
    return torch.stack(read, dim=1) if read else x.new_zeros(x.shape), state

"""Routers that answer with what is no number: counted where the rows are, read whenever the caller likes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from omnimoe.layers import RowLayout
from omnimoe.routers.base import Routing


@torch.no_grad()
def router_faults(routings: Sequence[Routing | None], rows: RowLayout, num_modalities: int) -> Tensor:
    """Counts the rows that each router could not route, by modality. Nothing is read back to the host.

    A row counts if one of its logits is NaN or plus infinity, or one of its weights is not finite. Minus infinity is
    no fault: it puts an expert out of reach.

    Args:
        routings: of the model, None where nothing is routed.
        rows: the layout they are over.
        num_modalities: M.

    Returns:
        ``(P, M)`` int64, one row a routing, on the device of the rows.
    """
    counts = [torch.zeros(num_modalities, dtype=torch.int64, device=rows.modality_ids.device) for _ in routings]
    for count, routing in zip(counts, routings, strict=True):
        if routing is not None:
            count.index_add_(0, rows.modality_ids, _is_faulty(routing, rows).long())
    return torch.stack(counts) if counts else torch.zeros(0, num_modalities, dtype=torch.int64)


def _is_faulty(routing: Routing, rows: RowLayout) -> Tensor:
    """``(N,)`` bool."""
    weighed = torch.zeros(len(rows), dtype=torch.int64, device=rows.modality_ids.device)
    faulty = weighed.index_add(0, routing.token_index, (~routing.expert_weights.isfinite()).long()) > 0
    if routing.router_logits is not None:
        logits = routing.router_logits
        faulty = faulty | (logits.isnan() | logits.isposinf()).any(-1)
    return faulty if rows.counted is None else faulty & rows.counted

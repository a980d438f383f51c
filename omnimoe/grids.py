"""Rotary positions in time, row and column, counted from the shapes of the pictures and clips that stand in a sequence.

A token of text advances all three by one. A span of T x H x W rows that begins at s gives its cell (t, r, c) the place
(s + t, s + r, s + c), and what follows it goes on at s + max(H, W), as in Qwen2-VL and ERNIE-4.5-VL.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from omnimoe.inputs import InputError, check_embedded, is_readable
from omnimoe.model_config import OmniMoeConfig


def grid_positions(
    config: OmniMoeConfig,
    modality_ids: Tensor,
    shapes: Mapping[str, Tensor],
    valid: Tensor | None = None,
    segment_ids: Tensor | None = None,
) -> Tensor:
    """Positions of whole sequences.

    Args:
        config: of the model.
        modality_ids: ``(B, T)`` int64.
        shapes: ``(S, 3)`` int64 by modality, rows along time, height and width of each of its spans, in order of batch
            and time. Rows of other modalities count as text does.
        valid: ``(B, T)`` bool, False at padding, which may stand in front.
        segment_ids: ``(B, T)`` int64, documents of a packed row; each counts from 0.

    Returns:
        ``(B, T, 3)`` int64.

    Raises:
        InputError: if the shapes are of more or fewer rows than the sequence has, or a span is torn apart.

    Source: https://arxiv.org/abs/2409.12191.
    """
    real = torch.ones_like(modality_ids, dtype=torch.bool) if valid is None else valid
    step = real.long().flatten()
    place = step.new_zeros(len(step), 3)
    for name, held in shapes.items():
        mine = (real & (modality_ids == config.modality_names.index(name))).flatten()
        held = held.to(modality_ids.device)
        counts = held.prod(-1)
        ends = counts.cumsum(0)
        if is_readable(mine):
            check_embedded(name, mine.new_empty(int(counts.sum())), int(mine.sum()))
        if not len(held):
            continue
        row = mine.long().cumsum(0) - 1
        span = torch.searchsorted(ends, row, right=True).clamp(max=len(held) - 1)
        cell = row - (ends - counts)[span]
        _, tall, wide = held[span].unbind(-1)
        is_last = mine & (cell == counts[span] - 1)
        if is_readable(mine):
            _check_whole(name, mine & (cell == 0), is_last, counts)
        cells = torch.stack((cell // (tall * wide), cell // wide % tall, cell % wide), dim=-1)
        place = torch.where(mine.unsqueeze(1), cells, place)
        step = torch.where(is_last, torch.maximum(tall, wide), torch.where(mine, 0, step))
    step = step.view_as(modality_ids)
    start = step.cumsum(1) - step
    if segment_ids is not None:
        begins = F.pad(segment_ids[:, 1:] != segment_ids[:, :-1], (1, 0), value=True)
        start = start - torch.where(begins, start, 0).cummax(dim=1).values
    return start.unsqueeze(-1) + place.view(*modality_ids.shape, 3)


def _check_whole(name: str, is_first: Tensor, is_last: Tensor, counts: Tensor) -> None:
    lengths = is_last.nonzero().squeeze(1) - is_first.nonzero().squeeze(1) + 1
    torn = (lengths != counts).nonzero().flatten().tolist()
    if torn:
        raise InputError(
            f"the {int(counts[torn[0]])} rows of span {torn[0]} of features[{name!r}] do not stand side by side in the "
            "sequence; pass pictures in order of batch and time, and a placeholder for each of their rows"
        )


__all__ = ["grid_positions"]

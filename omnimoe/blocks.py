"""Blocks: the spans that attend both ways, which of them are private, and the positions they share."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from omnimoe.model_config import OmniMoeConfig


def block_ids_of(
    config: OmniMoeConfig, modality_ids: Tensor, input_ids: Tensor | None = None, noisy: Tensor | None = None
) -> Tensor:
    """A number for each span of ``config.bidirectional_modalities``.

    Args:
        config: of the model; ``block_markers`` takes a span's begin and end token in, ``private_noise`` makes spans
            with noise private, ``private_blocks`` all; ``joint_blocks`` makes neighbouring spans one.
        modality_ids: ``(B, T)`` int64.
        input_ids: ``(B, T)`` int64, where boundary tokens are found; none are taken in where None.
        noisy: ``(B, T)`` bool, rows that carry noise; None where none does.

    Returns:
        ``(B, T)`` int64: 1 and up inside a block, -1 outside of all, -2 and below inside a private block.
    """
    blocked = [config.modality_names.index(name) for name in config.bidirectional_modalities]
    inside = torch.isin(modality_ids, torch.tensor(blocked, device=modality_ids.device))
    kinds = modality_ids.masked_fill(inside, -1) if config.joint_blocks else modality_ids
    starts = F.pad(kinds[:, 1:] != kinds[:, :-1], (1, 0), value=True)
    run = starts.cumsum(1)
    ids = run.masked_fill(~inside, -1)
    if config.private_blocks:
        ids = torch.where(inside, -1 - ids, ids)
    elif noisy is not None and config.private_noise:
        private = torch.zeros(len(run), run.shape[1] + 1, dtype=torch.int64, device=run.device)
        private = private.scatter_add(1, run, noisy.long()).gather(1, run) > 0
        ids = torch.where(private & inside, -1 - ids, ids)
    if config.block_markers and input_ids is not None:
        plain = ids == -1
        for held in config.modalities:
            if held.name not in config.bidirectional_modalities:
                continue
            mine = modality_ids == config.modality_names.index(held.name)
            before = F.pad(torch.where(mine, ids, -1)[:, 1:], (0, 1), value=-1)
            after = F.pad(torch.where(mine, ids, -1)[:, :-1], (1, 0), value=-1)
            # -1 is no token, so a boundary that the modality lacks is found nowhere
            opens = plain & (input_ids == (-1 if held.begin_id is None else held.begin_id))
            closes = plain & (input_ids == (-1 if held.end_id is None else held.end_id))
            ids = torch.where(opens & (before != -1), before, torch.where(closes & (after != -1), after, ids))
    return ids


def block_positions(block_ids: Tensor, valid: Tensor | None = None, segment_ids: Tensor | None = None) -> Tensor:
    """Positions under which a block is one place: its tokens share one, and a private block takes none of its own.

    Args:
        block_ids: ``(B, T)`` int64, as :func:`block_ids_of` gives them.
        valid: ``(B, T)`` bool, False at padding, which may stand in front.
        segment_ids: ``(B, T)`` int64, documents of a packed row; each counts from 0.

    Returns:
        ``(B, T)`` int64.

    Source: https://arxiv.org/abs/2505.14683.
    """
    last, here = block_ids[:, :-1], block_ids[:, 1:]
    stays = ((here == last) & (here != -1)) | (last < -1)
    step = F.pad((~stays).long(), (1, 0))
    if valid is not None:
        first = valid & ~F.pad(valid[:, :-1], (1, 0))
        step = torch.where(valid & ~first, step, 0)
    place = step.cumsum(1)
    if segment_ids is not None:
        begins = F.pad(segment_ids[:, 1:] != segment_ids[:, :-1], (1, 0), value=True)
        place = place - torch.where(begins, place, 0).cummax(dim=1).values
    return place


def span_counts(modality_ids: Tensor, valid: Tensor | None = None, segment_ids: Tensor | None = None) -> Tensor:
    """Positions counted from 0 in each span of one modality.

    Args:
        modality_ids: ``(B, T)`` int64.
        valid: ``(B, T)`` bool, False at padding, which may stand anywhere and counts for nothing.
        segment_ids: ``(B, T)`` int64, documents of a packed row; a span ends with its document.

    Returns:
        ``(B, T)`` int64.
    """
    real = torch.ones_like(modality_ids, dtype=torch.bool) if valid is None else valid
    place = torch.arange(modality_ids.shape[1], device=modality_ids.device).expand_as(modality_ids)
    # the last token before each position, which padding may keep apart from it
    last = F.pad(torch.where(real, place, -1).cummax(dim=1).values[:, :-1], (1, 0), value=-1)
    begins = last < 0
    for ids in (modality_ids, segment_ids):
        if ids is not None:
            begins = begins | (ids != ids.gather(1, last.clamp_min(0)))
    count = real.long().cumsum(1) - 1
    first = torch.where(begins & real, count, 0).cummax(dim=1).values
    return (count - first).clamp_min(0)


__all__ = ["block_ids_of", "block_positions", "span_counts"]

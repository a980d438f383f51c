"""The partition of the vocabulary as a grammar's facts: whose rows are whose, and where a sequence stands.

A document is text with spans of other modalities in it, each between its boundary tokens. Where a sequence stands
depends on the last boundary token and the distance to it alone, so one reduction over the ids of a batch finds the
state of every row.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from omnimoe.modalities import TokenRange
from omnimoe.model_config import OmniMoeConfig


class SpanError(ValueError):
    """A modality, a length or a sequence that does not fit the model's partition of the vocabulary."""


def bounded_ranges(config: OmniMoeConfig) -> dict[str, TokenRange]:
    """The discrete modalities whose spans stand between boundary tokens."""
    return {
        name: held
        for name, held in config.token_ranges.items()
        if held.begin_id is not None and held.end_id is not None
    }


def has_spans(config: OmniMoeConfig) -> bool:
    """Whether the partition says anything about what may follow: two discrete modalities, one of them bounded."""
    return len(config.token_ranges) > 1 and bool(bounded_ranges(config))


def owned_rows(config: OmniMoeConfig) -> dict[str, Tensor]:
    """The rows that carry content of each discrete modality.

    Returns:
        ``(V,)`` bool on the CPU, a modality each: its range without the parts that later modalities cut out, without
        boundary, placeholder, padding, begin and end of document.
    """
    ranges = config.token_ranges
    owner = torch.full((config.vocab_size,), -1, dtype=torch.int64)
    for index, held in enumerate(ranges.values()):
        owner[held.start : held.stop] = index
    owner[sorted(_special_ids(config))] = -1
    return {name: owner == index for index, name in enumerate(ranges)}


class SpanReader:
    """Says in which span a sequence stands, and how far.

    Args:
        config: the model's.
        names: modalities to know, in the order of their groups, continuous ones among them if need be; those of
            :func:`bounded_ranges` where None. A modality without both boundary tokens has no spans.

    Attributes:
        names: ``("", ...)``, the modality of each group; group 0 is outside of spans.
        end_rows: ``(groups,)`` int64, the row of each group's end token, -1 for group 0.
    """

    def __init__(self, config: OmniMoeConfig, names: Sequence[str] | None = None) -> None:
        wanted = list(bounded_ranges(config)) if names is None else names
        held = {part.name: part for part in config.modalities}
        bounds = [(name, held[name].begin_id, held[name].end_id) for name in wanted]
        known = [(name, begin, end) for name, begin, end in bounds if begin is not None and end is not None]
        self.names = ("", *(name for name, _, _ in known))
        self.end_rows = torch.tensor([-1, *(end for _, _, end in known)])
        self._opens = torch.zeros(config.vocab_size, dtype=torch.int64)
        self._marks = torch.zeros(config.vocab_size, dtype=torch.bool)
        self._marks[[token for token in (config.bos_token_id, *end_ids(config)) if token is not None]] = True
        for group, (_, begin, end) in enumerate(known, 1):
            self._opens[begin] = group
            self._marks[[begin, end]] = True

    def state(self, input_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Where each row of a batch stands.

        Args:
            input_ids: ``(B, T)`` int64 on any device; padding may stand in front.

        Returns:
            ``(B,)`` int64: the group of the open span, 0 outside of spans; and ``(B,)`` int64: how many positions there
            are since the last boundary.
        """
        marks, opens, place = self._read(input_ids)
        last = (marks * place).amax(dim=1)
        return opens.gather(1, last.unsqueeze(1)).squeeze(1), place[-1] - last

    def states(self, input_ids: Tensor) -> tuple[Tensor, Tensor]:
        """The same before every position: ``(B, T)`` ids to ``(B, T)`` groups and ``(B, T)`` counts."""
        marks, opens, place = self._read(input_ids[:, :-1])
        last = (marks * place).cummax(dim=1).values
        return opens.gather(1, last), place - last

    def _read(self, input_ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        device = input_ids.device
        self._opens, self._marks = self._opens.to(device), self._marks.to(device)
        # One column in front stands for "no boundary so far".
        marks = F.pad(self._marks[input_ids], (1, 0))
        opens = F.pad(self._opens[input_ids], (1, 0))
        return marks, opens, torch.arange(marks.shape[1], device=device)


def span_positions(
    config: OmniMoeConfig,
    input_ids: Tensor,
    grids: Mapping[str, Sequence[int]],
    attention_mask: Tensor | None = None,
) -> Tensor:
    """Rotary positions in time, row and column, read off the ids of whole sequences.

    They are those of :func:`omnimoe.data.documents.lay_out`: every token advances time by one; row and column equal the
    time except inside a span with a grid that starts at time s, where the cell (r, c) has row s + r and column s + c;
    the frames of a video follow each other in time and have the same rows and columns.

    Args:
        config: the model's.
        input_ids: ``(B, T)`` int64.
        grids: rows and columns of a picture, or of each frame of a video, by modality.
        attention_mask: ``(B, T)``, 0 for padding, which may stand in front.

    Returns:
        ``(B, T, 3)`` int64, 0 at padding in front.

    Raises:
        SpanError: if a grid is of no modality with boundary tokens.
    """
    spatial = [held.name for held in config.modalities if held.begin_id is not None and held.end_id is not None]
    for name, grid in grids.items():
        if name not in spatial or len(grid) != 2 or min(grid) < 1:
            raise SpanError(
                f"grids maps {name!r} to {tuple(grid)!r}; pass (rows, columns) of {', '.join(spatial) or 'no modality'}"
            )
    reader = SpanReader(config, spatial)
    group, count = reader.states(input_ids)
    valid = torch.ones_like(input_ids) if attention_mask is None else attention_mask.long()
    time = (valid.cumsum(1) - 1).clamp_min(0)
    sizes = torch.tensor([tuple(grids.get(name, (0, 0))) for name in reader.names]).to(input_ids.device)
    tall, wide = sizes[group].unbind(-1)
    # the end token stands after the last cell, in a column of its own
    inside = (wide > 0) & (input_ids != reader.end_rows.to(input_ids.device)[group])
    start, wide = time - count, wide.clamp_min(1)
    cell = count % (tall.clamp_min(1) * wide)
    row = torch.where(inside, start + cell // wide, time)
    column = torch.where(inside, start + cell % wide, time)
    return torch.stack((time, row, column), dim=-1)


def position_axes(config: OmniMoeConfig) -> int:
    """The most axes that rotary positions have in any layer, at least 1."""
    ropes = [getattr(block.attention, "rope", None) for block in config.blocks]
    return max((rope.num_axes for rope in ropes if rope is not None), default=1)


def end_ids(config: OmniMoeConfig) -> list[int]:
    """The rows that end a document."""
    eos = config.eos_token_id
    return [] if eos is None else list(eos) if isinstance(eos, list | tuple) else [eos]


def _special_ids(config: OmniMoeConfig) -> set[int]:
    found = {config.pad_token_id, config.bos_token_id, *end_ids(config)}
    for held in config.modalities:
        found |= {token for ids in held.ids_of_spans for token in ids}
    return {token for token in found if token is not None}

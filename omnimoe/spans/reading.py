"""A finished sequence, taken apart into its spans."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from omnimoe.model_config import OmniMoeConfig
from omnimoe.spans.partition import SpanError, bounded_ranges, end_ids, owned_rows


@dataclass(frozen=True, kw_only=True)
class Span:
    """A run of one modality in a sequence.

    Args:
        modality: its name.
        ids: ``(n,)`` int64 local ids: row minus the first row of the modality's range.
        is_whole: the span was closed, and has its fixed length where it has one. Text is always whole.
    """

    modality: str
    ids: Tensor
    is_whole: bool


def read_spans(ids: Tensor, config: OmniMoeConfig) -> list[Span]:
    """Takes a sequence apart.

    Args:
        ids: ``(T,)`` int64 rows of the vocabulary; it ends at an end of document, if there is one.
        config: the model's.

    Returns:
        The spans in order. Text between two spans is one span; boundary tokens, padding and begin of document are left
        out, and so are rows that nobody owns and spans without a row.

    Raises:
        SpanError: if a row of another modality stands inside a span.
    """
    ranges, bounded = config.token_ranges, bounded_ranges(config)
    ends, begins = set(end_ids(config)), {held.begin_id: name for name, held in bounded.items()}
    owners = owned_rows(config)
    owner_of = torch.full((config.vocab_size,), -1)
    for index, rows in enumerate(owners.values()):
        owner_of[rows] = index
    names = list(owners)
    found: list[Span] = []
    open_name: str | None = None
    held_ids: list[tuple[str, int]] = []

    def close(is_whole: bool) -> None:
        if held_ids:
            name = open_name or held_ids[0][0]
            local = torch.tensor([row for _, row in held_ids]) - ranges[name].start
            length = ranges[name].num_tokens if open_name else None
            found.append(Span(modality=name, ids=local, is_whole=is_whole and length in (None, len(local))))
        held_ids.clear()

    for place, row in enumerate(ids.tolist()):
        if row in ends:
            close(open_name is None)
            return found
        if row in begins:
            close(open_name is None)
            open_name = begins[row]
        elif open_name is not None and row == bounded[open_name].end_id:
            close(True)
            open_name = None
        elif owner_of[row] >= 0:
            name = names[int(owner_of[row])]
            if open_name is not None and name != open_name:
                raise SpanError(f"row {row} at {place} belongs to {name}, inside a span of {open_name}")
            if held_ids and open_name is None and held_ids[0][0] != name:
                close(True)
            held_ids.append((name, row))
    close(open_name is None)
    return found

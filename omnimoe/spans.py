"""The partition of the vocabulary as a grammar: which rows may follow, and where spans lie in a finished sequence.

A document is text with spans of other modalities in it, each between its boundary tokens. Outside of spans only text,
begin tokens and the end of the document may follow; inside, only rows of the span's modality, then its end token. What
may follow depends on the last boundary token and the distance to it alone, so one reduction over the ids of a batch
finds the state of every row.

Modalities without both boundary tokens have no spans: their rows may stand anywhere outside of spans.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import LogitsProcessor

from omnimoe.modalities import TokenRange
from omnimoe.model_config import OmniMoeConfig


class SpanError(ValueError):
    """A modality, a length or a sequence that does not fit the model's partition of the vocabulary."""


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


class SpanProcessor(LogitsProcessor):
    """Keeps generation inside the grammar; ``model.generate`` adds it by itself.

    Args:
        config: the model's.
        spans: modalities that may be opened, names of bounded ones; None for all.
        max_span: longest span of a modality of free length, one number or one by name; then the end token is forced.
        temperature: by modality, where one is to differ; logits at its positions are divided by it. Boundary tokens
            after a span's last position count as the span's.
        top_k: by modality: keep so many rows at its positions.

    Raises:
        SpanError: if the model has no bounded modality, or an argument names another or is out of range.

    Example:
        >>> from omnimoe import OmniMoeConfig, Tokens
        >>> text = Tokens.Config(name="text", vocab_size=6)
        >>> image = Tokens.Config(name="image", vocab_size=3, begin_id=3, end_id=4, num_tokens=2)
        >>> processor = SpanProcessor(OmniMoeConfig(modalities=(text, image)))
        >>> [row.nonzero().flatten().tolist() for row in processor.allowed(torch.tensor([[5, 3], [3, 7]]))]
        [[6, 7, 8], [6, 7, 8]]
        >>> processor.allowed(torch.tensor([[3, 7, 8]])).nonzero()[:, 1].tolist()
        [4]
    """

    supports_continuous_batching = False

    def __init__(
        self,
        config: OmniMoeConfig,
        *,
        spans: Sequence[str] | None = None,
        max_span: int | Mapping[str, int] | None = None,
        temperature: Mapping[str, float] | None = None,
        top_k: Mapping[str, int] | None = None,
    ) -> None:
        bounded = bounded_ranges(config)
        if not has_spans(config):
            raise SpanError(f"the modalities {', '.join(config.modality_names)} have no boundary tokens to follow")
        self._check(config, bounded, spans, max_span, temperature, top_k)
        rows = owned_rows(config)
        free = [name for name in rows if name not in bounded]
        outside = torch.zeros(config.vocab_size, dtype=torch.bool)
        for name in free:
            outside |= rows[name]
        outside[_ends(config)] = True
        opened = {name: held.begin_id for name, held in bounded.items()}
        # The begin of a continuous span may come too: the caller stops there and denoises.
        opened |= {
            held.name: held.begin_id for held in config.modalities if not held.is_discrete and held.begin_id is not None
        }
        outside[[begin for name, begin in opened.items() if spans is None or name in spans]] = True

        # States: 0 outside, then three a modality: its rows; its rows or its end; its end.
        states = [outside]
        limits = [0]
        self._opens = torch.zeros(config.vocab_size, dtype=torch.int64)
        self._marks = torch.zeros(config.vocab_size, dtype=torch.bool)
        self._marks[[token for token in (config.bos_token_id, *_ends(config)) if token is not None]] = True
        endless = torch.iinfo(torch.int64).max
        for group, (name, held) in enumerate(bounded.items(), 1):
            end = torch.zeros_like(outside)
            end[held.end_id] = True
            states += [rows[name], rows[name] | end, end]
            longest = max_span.get(name) if isinstance(max_span, Mapping) else max_span
            limits.append(held.num_tokens or longest or endless)
            self._opens[held.begin_id] = group
            self._marks[[held.begin_id, held.end_id]] = True
        self._allowed = torch.stack(states)  # (states, V)
        self._limits = torch.tensor(limits)
        self._is_fixed = torch.tensor([True, *(held.num_tokens is not None for held in bounded.values())])
        names = ["", *bounded]
        self._temperature = _by_group(temperature, names, free, 1.0)
        self._top_k = _by_group(top_k, names, free, config.vocab_size)

    @staticmethod
    def _check(config, bounded, spans, max_span, temperature, top_k) -> None:
        continuous = [held.name for held in config.modalities if not held.is_discrete]
        for name in spans or ():
            if name not in bounded and name not in continuous:
                raise SpanError(f"spans names {name!r}; spans of {', '.join([*bounded, *continuous])} can be opened")
        lengths = max_span if isinstance(max_span, Mapping) else {} if max_span is None else {"": max_span}
        for what, given, low in (("max_span", lengths, 1), ("top_k", top_k, 1), ("temperature", temperature, 0)):
            for name, value in (given or {}).items():
                if name and name not in config.token_ranges:
                    raise SpanError(f"{what} names {name!r}; the modalities are {', '.join(config.token_ranges)}")
                if value < low or (what == "temperature" and value == 0):
                    raise SpanError(f"{what} must be {'positive' if low == 0 else 'at least 1'}, got {value!r}")

    def state(self, input_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Where each row of a batch stands.

        Args:
            input_ids: ``(B, T)`` int64 on any device; padding may stand in front.

        Returns:
            ``(B,)`` int64: the open modality, from 1 in the order of :func:`bounded_ranges` or 0 outside of spans; and
            ``(B,)`` int64: how many positions of it there are.
        """
        self._to(input_ids.device)
        # One column in front stands for "no boundary so far".
        marks = F.pad(self._marks[input_ids], (1, 0))
        place = torch.arange(marks.shape[1], device=input_ids.device)
        last = (marks * place).amax(dim=1)
        group = F.pad(self._opens[input_ids], (1, 0)).gather(1, last.unsqueeze(1)).squeeze(1)
        return group, marks.shape[1] - 1 - last

    def allowed(self, input_ids: Tensor) -> Tensor:
        """``(B, T)`` int64 to ``(B, V)`` bool: the rows that may come next."""
        return self._next(*self.state(input_ids))

    def _next(self, group: Tensor, count: Tensor) -> Tensor:
        is_full = count >= self._limits[group]
        phase = torch.where(is_full, 2, torch.where(self._is_fixed[group] | (count == 0), 0, 1))
        return self._allowed[torch.where(group == 0, 0, 3 * group - 2 + phase)]

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """``(B, T)`` ids and ``(B, V)`` logits to logits, minus infinity where a row may not follow."""
        group, count = self.state(input_ids)
        scores = scores.masked_fill(~self._next(group, count), -torch.inf)
        if self._temperature is not None:
            scores = scores / self._temperature[group].unsqueeze(1).to(scores.dtype)
        if self._top_k is not None:
            most = self._top_k[group].clamp(max=scores.shape[1])
            lowest = scores.sort(dim=1, descending=True).values.gather(1, most.unsqueeze(1) - 1)
            scores = scores.masked_fill(scores < lowest, -torch.inf)
        return scores

    def _to(self, device: torch.device) -> None:
        if self._opens.device != device:
            for name, value in vars(self).items():
                if isinstance(value, Tensor):
                    setattr(self, name, value.to(device))


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
    ends, begins = set(_ends(config)), {held.begin_id: name for name, held in bounded.items()}
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


def _ends(config: OmniMoeConfig) -> list[int]:
    eos = config.eos_token_id
    return [] if eos is None else list(eos) if isinstance(eos, list | tuple) else [eos]


def _special_ids(config: OmniMoeConfig) -> set[int]:
    found = {config.pad_token_id, config.bos_token_id, *_ends(config)}
    for held in config.modalities:
        found |= {held.begin_id, held.end_id, held.placeholder_id}
    return {token for token in found if token is not None}


def _by_group(given: Mapping[str, float] | None, names: list[str], free: list[str], usual: float) -> Tensor | None:
    """One value a state's modality; group 0 takes that of the first modality without spans that is named."""
    if not given:
        return None
    base = next((given[name] for name in free if name in given), usual)
    return torch.tensor([base, *(given.get(name, usual) for name in names[1:])])

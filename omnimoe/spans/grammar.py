"""The partition of the vocabulary as a grammar: which rows may follow.

Outside of spans only text, begin tokens and the end of the document may follow; inside, only rows of the span's
modality, then its end token. Modalities without both boundary tokens have no spans: their rows may stand anywhere
outside of spans.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from transformers import LogitsProcessor

from omnimoe.model_config import OmniMoeConfig
from omnimoe.spans.choices import SpanChoices, check_values
from omnimoe.spans.partition import SpanError, SpanReader, bounded_ranges, end_ids, has_spans, owned_rows


class SpanProcessor(LogitsProcessor):
    """Keeps generation inside the grammar; ``model.generate`` adds it by itself.

    Args:
        config: the model's.
        spans: modalities that may be opened, names of bounded ones; None for all.
        max_span: longest span of a modality of free length, one number or one by name; then, after the last whole frame
            within it, the end token is forced.
        temperature: by modality, where one is to differ; logits at its positions are divided by it. Boundary tokens
            after a span's last position count as the span's.
        top_k: by modality: keep so many rows at its positions.
        top_p: by modality: keep the most likely rows that hold this share.
        min_p: by modality: keep rows at least this share as likely as the likeliest.

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
        top_p: Mapping[str, float] | None = None,
        min_p: Mapping[str, float] | None = None,
    ) -> None:
        bounded = bounded_ranges(config)
        if not has_spans(config):
            raise SpanError(f"the modalities {', '.join(config.modality_names)} have no boundary tokens to follow")
        begins = {
            held.name: held.begin_id for held in config.modalities if not (held.is_discrete or held.is_input_only)
        }
        for name in spans or ():
            if name not in bounded and name not in begins:
                raise SpanError(f"spans names {name!r}; spans of {', '.join([*bounded, *begins])} can be opened")
        if isinstance(max_span, Mapping):
            check_values(config, "max_span", max_span, least=1)
        elif max_span is not None and not 1 <= max_span < math.inf:
            raise SpanError(f"max_span must be at least 1 and finite, got {max_span!r}")
        self._choose = SpanChoices(config, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
        self._reader = SpanReader(config)
        rows = owned_rows(config)
        outside = torch.zeros(config.vocab_size, dtype=torch.bool)
        for name in rows.keys() - bounded.keys():
            outside |= rows[name]
        outside[end_ids(config)] = True
        # The begin of a continuous span may come too: the caller stops there and denoises.
        opened = {name: held.begin_id for name, held in bounded.items()} | begins
        opens = [begin for name, begin in opened.items() if begin is not None and (spans is None or name in spans)]
        outside[opens] = True

        # States: 0 outside, then three a modality: its rows; its rows or its end; its end.
        states = [outside]
        limits = [0]
        endless = torch.iinfo(torch.int64).max
        for name, held in bounded.items():
            end = torch.zeros_like(outside)
            end[held.end_id] = True
            states += [rows[name], rows[name] | end, end]
            longest = max_span.get(name) if isinstance(max_span, Mapping) else max_span
            if longest and not held.num_tokens and longest < held.frame_size:
                raise SpanError(f"max_span of {name} is {longest}, and a frame of it has {held.frame_size} tokens")
            limits.append(held.num_tokens or (longest or endless) // held.frame_size * held.frame_size)
        self._allowed = torch.stack(states)  # (states, V)
        self._limits = torch.tensor(limits)
        self._is_fixed = torch.tensor([True, *(held.num_tokens is not None for held in bounded.values())])
        self._frames = torch.tensor([1, *(held.frame_size for held in bounded.values())])

    def state(self, input_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Where each row of a batch stands; see :meth:`SpanReader.state`."""
        return self._reader.state(input_ids)

    def allowed(self, input_ids: Tensor) -> Tensor:
        """``(B, T)`` int64 to ``(B, V)`` bool: the rows that may come next."""
        return self._next(*self.state(input_ids))

    def _next(self, group: Tensor, count: Tensor) -> Tensor:
        device = group.device
        self._allowed, self._limits = self._allowed.to(device), self._limits.to(device)
        self._is_fixed, self._frames = self._is_fixed.to(device), self._frames.to(device)
        is_full = count >= self._limits[group]
        must_go_on = self._is_fixed[group] | (count == 0) | (count % self._frames[group] > 0)
        phase = torch.where(is_full, 2, torch.where(must_go_on, 0, 1))
        return self._allowed[torch.where(group == 0, 0, 3 * group - 2 + phase)]

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """``(B, T)`` ids and ``(B, V)`` logits to logits, minus infinity where a row may not follow."""
        group, count = self.state(input_ids)
        return self._choose(scores.masked_fill(~self._next(group, count), -torch.inf), group)

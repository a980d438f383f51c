"""Classifier-free guidance inside spans: a second, unconditioned forward beside the usual one.

transformers' own (``guidance_scale``) guides every position of one context that the caller provides for each row. Here
rows of a batch enter and leave spans at different steps, text stays as it is, and the unconditioned context of a row is
the span itself: ``<bos>``, its begin token, and what stands in it so far.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessor

from omnimoe.spans.grammar import SpanProcessor
from omnimoe.spans.partition import SpanError, SpanReader, bounded_ranges, has_spans, span_positions


class GuidanceProcessor(LogitsProcessor):
    """Moves logits inside spans away from what the model would say of the span alone.

    With logits c of the usual forward and u of the unconditioned one, ``u + scale * (c - u)``. ``model.generate`` adds
    it where its argument ``guidance`` asks for it, before the grammar.

    The unconditioned keys and values are kept from step to step as long as the same rows go on; otherwise, as with
    beams or where a row of the batch opens a span, they are computed anew.

    Args:
        model: the causal model; its config is read.
        scale: one number for all modalities with boundary tokens, or one by name; 1 leaves a modality as it is, 0
            ignores the prompt.
        use_cache: keep keys and values.
        grids: rows and columns by modality, where positions have several axes.

    Raises:
        SpanError: if a scale names another modality or is negative, or copies are picked by other keys than modalities.

    Source: https://arxiv.org/abs/2207.12598; for language models, https://arxiv.org/abs/2306.17806.
    """

    supports_continuous_batching = False

    def __init__(
        self,
        model: Any,
        scale: float | Mapping[str, float],
        *,
        use_cache: bool = True,
        grids: Mapping[str, Sequence[int]] | None = None,
    ) -> None:
        config = model.config
        bounded = bounded_ranges(config)
        scales = dict(scale) if isinstance(scale, Mapping) else dict.fromkeys(bounded, scale)
        for name, value in scales.items():
            if name not in bounded:
                known = ", ".join(bounded) or "none"
                raise SpanError(f"guidance names {name!r}; the modalities with boundary tokens are {known}")
            if not 0 <= value < math.inf:
                raise SpanError(f"guidance must be 0 or more, got {value!r}")
        if not bounded:
            raise SpanError(
                f"the modalities {', '.join(config.modality_names)} have no boundary tokens to guide within"
            )
        if config.keys:
            raise SpanError(
                f"copies are picked by the keys {config.keys}, and a lone span has none; leave guidance out"
            )
        self._model, self._use_cache, self._grids = model, use_cache, grids
        self._reader = SpanReader(config)
        self._scale = torch.tensor([1.0, *(float(scales.get(name, 1)) for name in bounded)])
        # after the last position of a span only its end token may come, which needs no guidance
        endless = torch.iinfo(torch.int64).max
        self._limits = torch.tensor([0, *(held.num_tokens or endless for held in bounded.values())])
        self._cache: Any = None
        self._seen = torch.empty(0, 0, dtype=torch.int64)

    @property
    def is_idle(self) -> bool:
        """Whether every scale is 1, so that nothing would change."""
        return bool((self._scale == 1).all())

    @torch.no_grad()
    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """``(B, T)`` ids and ``(B, V)`` logits to logits, guided where a span is open."""
        device = input_ids.device
        self._scale, self._limits = self._scale.to(device), self._limits.to(device)
        group, count = self._reader.state(input_ids)
        rows = ((self._scale[group] != 1) & (count < self._limits[group])).nonzero().squeeze(1)
        if not len(rows):
            return scores
        plain = self._unconditioned(*self._context(input_ids[rows], count[rows])).to(scores)
        scale = self._scale[group[rows]].unsqueeze(1).to(scores.dtype)
        return scores.index_copy(0, rows, plain + scale * (scores[rows] - plain))

    def _context(self, input_ids: Tensor, count: Tensor) -> tuple[Tensor, Tensor]:
        """The lone spans, left-padded: ids and mask, ``(R, P)`` int64 each."""
        bos = self._model.config.bos_token_id
        first = 0 if bos is None else 1
        length = count + 1 + first
        longest = int(length.max())
        column = torch.arange(longest, device=input_ids.device)
        place = input_ids.shape[1] - longest + column
        ids = input_ids[:, place.clamp_min(0)]
        start = (longest - length).unsqueeze(1)
        mask = (column >= start).long()
        if bos is not None:
            ids = ids.masked_fill(column == start, bos)
        return ids.masked_fill(mask == 0, 0), mask

    def _unconditioned(self, ids: Tensor, mask: Tensor) -> Tensor:
        """``(R, V)`` logits after each context."""
        config = self._model.config
        # what is kept serves if every row is the one it was, longer by a token
        known = ids.masked_fill(mask == 0, -1)
        before = known[:, :-1]
        goes_on = self._cache is not None and before.shape == self._seen.shape and torch.equal(before, self._seen)
        new = 1 if goes_on else ids.shape[1]
        if self._grids is None:
            positions = (mask.cumsum(1) - 1).clamp_min(0)
        else:
            positions = span_positions(config, ids, self._grids, mask)
        out = self._model(
            ids[:, -new:],
            attention_mask=mask,
            position_ids=positions[:, -new:],
            past_key_values=self._cache if goes_on else None,
            use_cache=self._use_cache,
            logits_to_keep=1,
        )
        self._cache, self._seen = (out.past_key_values if self._use_cache else None), known
        return out.logits[:, -1]


def span_processors(model: Any, given: Mapping[str, Any], *, use_cache: bool = True) -> list[LogitsProcessor]:
    """What ``model.generate`` puts before all other processors.

    Args:
        model: the causal model.
        given: arguments of ``generate``: ``free``, ``spans``, ``max_span``, ``span_temperature``, ``span_top_k``,
            ``span_top_p``, ``span_min_p``, ``guidance`` and ``grids``.
        use_cache: whether generation keeps a cache.

    Returns:
        Guidance, if asked for, then the grammar, where the model has one and ``free`` does not forbid it.

    Raises:
        SpanError: if an argument does not fit the model.
    """
    found: list[LogitsProcessor] = []
    if given.get("guidance") is not None:
        guide = GuidanceProcessor(model, given["guidance"], use_cache=use_cache, grids=given.get("grids"))
        found += [] if guide.is_idle else [guide]
    options = {name: given.get(name) for name in ("spans", "max_span")}
    options |= {name: given.get(f"span_{name}") for name in ("temperature", "top_k", "top_p", "min_p")}
    wanted = has_spans(model.config) or any(value is not None for value in options.values())
    if wanted and not given.get("free"):
        found.append(SpanProcessor(model.config, **options))
    return found

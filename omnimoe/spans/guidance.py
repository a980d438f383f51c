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
import torch.nn.functional as F
from torch import Tensor
from transformers import LogitsProcessor

from omnimoe.spans.grammar import SpanProcessor
from omnimoe.spans.partition import SpanError, SpanReader, bounded_ranges, has_spans, owned_rows, span_positions

Scale = float | tuple[float, float]
"""How far to move away from the span alone; or from the document without its words, and how far that from the span."""


class _SecondForward:
    """Logits after contexts that are not those of generation, with keys and values of their own.

    They are kept from step to step as long as the same rows go on; otherwise, as with beams or where a row of the batch
    opens a span, they are computed anew.

    Args:
        model: the causal model.
        use_cache: keep keys and values.
        grids: rows and columns by modality, where positions have several axes.
    """

    def __init__(self, model: Any, *, use_cache: bool, grids: Mapping[str, Sequence[int]] | None) -> None:
        self._model, self._use_cache, self._grids = model, use_cache, grids
        self._cache: Any = None
        self._seen = torch.empty(0, 0, dtype=torch.int64)

    def __call__(self, ids: Tensor, mask: Tensor) -> Tensor:
        """``(R, P)`` int64 ids and mask, padded in front, to ``(R, V)`` logits."""
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


class GuidanceProcessor(LogitsProcessor):
    """Moves logits inside spans away from what the model would say of the span alone.

    With logits c of the usual forward and u of the unconditioned one, ``u + scale * (c - u)``. With two scales there is
    a third forward, whose logits w see the document without its words, all its spans: ``u + second * (w - u) + scale *
    (c - w)``. ``model.generate`` adds the processor where its argument ``guidance`` asks for it, before the grammar.

    Args:
        model: the causal model; its config is read.
        scale: one number for all modalities with boundary tokens, or one by name, or two by name; 1 leaves a modality
            as it is, 0 ignores the prompt.
        use_cache: keep keys and values.
        grids: rows and columns by modality, where positions have several axes.

    Raises:
        SpanError: if a scale names another modality or is negative, or copies are picked by other keys than modalities.

    Source: https://arxiv.org/abs/2207.12598; for language models, https://arxiv.org/abs/2306.17806; with two scales,
    https://arxiv.org/abs/2211.09800.
    """

    supports_continuous_batching = False

    def __init__(
        self,
        model: Any,
        scale: Scale | Mapping[str, Scale],
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
            pair = value if isinstance(value, tuple | list) else (value,)
            if len(pair) not in (1, 2) or not all(0 <= one < math.inf for one in pair):
                raise SpanError(f"guidance must be 0 or more and finite, got {value!r}; give one number, or two")
        if not bounded:
            raise SpanError(
                f"the modalities {', '.join(config.modality_names)} have no boundary tokens to guide within"
            )
        if config.keys:
            raise SpanError(
                f"copies are picked by the keys {config.keys}, and a lone span has none; leave guidance out"
            )
        self._bos = config.bos_token_id
        self._reader = SpanReader(config)
        # with one scale the document without its words counts as the span alone
        pairs = [scales.get(name, 1) for name in bounded]
        both = [(*pair, 1)[:2] if isinstance(pair, tuple | list) else (pair, 1) for pair in pairs]
        self._scale = torch.tensor([(1.0, 1.0), *((float(one), float(other)) for one, other in both)])
        self._has_two = torch.tensor([False, *(isinstance(pair, tuple | list) and len(pair) == 2 for pair in pairs)])
        # after the last position of a span only its end token may come, which needs no guidance
        endless = torch.iinfo(torch.int64).max
        self._limits = torch.tensor([0, *(held.num_tokens or endless for held in bounded.values())])
        rows = owned_rows(config)
        self._is_span = torch.stack([rows[name] for name in bounded]).any(0)
        self._is_span[[token for held in bounded.values() for token in (held.begin_id, held.end_id)]] = True
        self._alone, self._wordless = (_SecondForward(model, use_cache=use_cache, grids=grids) for _ in range(2))

    @property
    def is_idle(self) -> bool:
        """Whether every scale is 1, so that nothing would change."""
        return bool((self._scale == 1).all())

    @torch.no_grad()
    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """``(B, T)`` ids and ``(B, V)`` logits to logits, guided where a span is open."""
        device = input_ids.device
        self._scale, self._limits = self._scale.to(device), self._limits.to(device)
        self._has_two, self._is_span = self._has_two.to(device), self._is_span.to(device)
        group, count = self._reader.state(input_ids)
        rows = ((self._scale[group] != 1).any(1) & (count < self._limits[group])).nonzero().squeeze(1)
        if not len(rows):
            return scores
        own, given = input_ids[rows], scores[rows]
        alone = self._padded(own, torch.arange(own.shape[1], device=device) >= own.shape[1] - 1 - count[rows, None])
        plain = self._alone(*alone).to(scores)
        scale, second = (part.unsqueeze(1) for part in self._scale[group[rows]].to(scores.dtype).unbind(1))
        has_two, wordless = self._has_two[group[rows]].unsqueeze(1), plain
        if bool(has_two.any()):
            context = self._padded(own, self._is_span[own])
            if not (context[0].shape == alone[0].shape and torch.equal(context[0], alone[0])):
                wordless = torch.where(has_two, self._wordless(*context).to(scores), plain)
        return scores.index_copy(0, rows, plain + second * (wordless - plain) + scale * (given - wordless))

    def _padded(self, ids: Tensor, kept: Tensor) -> tuple[Tensor, Tensor]:
        """The kept ones of ``(R, T)`` ids behind a begin of document, padded in front: ids and mask ``(R, P)``."""
        length = kept.sum(1)
        longest = int(length.max())
        order = kept.long().argsort(dim=1, stable=True)[:, ids.shape[1] - longest :]
        mask = (torch.arange(longest, device=ids.device) >= (longest - length).unsqueeze(1)).long()
        ids = ids.gather(1, order).masked_fill(mask == 0, 0)
        if self._bos is None:
            return ids, mask
        ids, mask = F.pad(ids, (1, 0)), F.pad(mask, (1, 0))
        first = torch.arange(longest + 1, device=ids.device) == (longest - length).unsqueeze(1)
        return ids.masked_fill(first, self._bos), mask.masked_fill(first, 1)


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

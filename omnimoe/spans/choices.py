"""How the next token is chosen, by modality: temperature, ``top_k``, ``top_p`` and ``min_p``."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from omnimoe.model_config import OmniMoeConfig
from omnimoe.spans.partition import SpanError, bounded_ranges


class SpanChoices:
    """Sharpens and cuts logits, each row by the modality of the span it stands in.

    Applied in transformers' order: temperature, ``top_k``, ``top_p``, ``min_p``; each counts what the one before left.
    Of several modalities without spans, which can follow one another, the first that is named counts for all.

    Args:
        config: the model's.
        temperature: by modality; logits are divided by it.
        top_k: by modality: keep so many rows, and those equal to the last of them.
        top_p: by modality: keep the most likely rows that hold this share.
        min_p: by modality: keep rows at least this share as likely as the likeliest.

    Raises:
        SpanError: if a modality is unknown or a value out of range.
    """

    def __init__(
        self,
        config: OmniMoeConfig,
        *,
        temperature: Mapping[str, float] | None = None,
        top_k: Mapping[str, int] | None = None,
        top_p: Mapping[str, float] | None = None,
        min_p: Mapping[str, float] | None = None,
    ) -> None:
        check_values(config, "temperature", temperature, above=0)
        check_values(config, "top_k", top_k, least=1)
        check_values(config, "top_p", top_p, above=0, most=1)
        check_values(config, "min_p", min_p, least=0, most=1)
        bounded = list(bounded_ranges(config))
        free = [name for name in config.token_ranges if name not in bounded]
        self._temperature = _by_group(temperature, bounded, free, 1.0)
        self._top_k = _by_group(top_k, bounded, free, config.vocab_size)
        self._top_p = _by_group(top_p, bounded, free, 1.0)
        self._min_p = _by_group(min_p, bounded, free, 0.0)

    def __call__(self, scores: Tensor, group: Tensor) -> Tensor:
        """Logits to logits, minus infinity at rows that are cut.

        Args:
            scores: ``(B, V)`` floating point.
            group: ``(B,)`` int64, of :meth:`~omnimoe.spans.SpanReader.state`.
        """
        temperature, top_k, top_p, min_p = (
            None if held is None else held.to(scores.device)[group].unsqueeze(1)
            for held in (self._temperature, self._top_k, self._top_p, self._min_p)
        )
        if temperature is not None:
            scores = scores / temperature.to(scores.dtype)
        if top_k is None and top_p is None and min_p is None:
            return scores
        ranked = scores.sort(dim=1, descending=True).values
        # what is kept is always the front of the ranking, so one count says it all
        kept = ranked.isfinite().sum(1, keepdim=True).clamp_min(1)
        if top_k is not None:
            kept = torch.minimum(kept, top_k)
        place = torch.arange(scores.shape[1], device=scores.device)
        if top_p is not None:
            share = ranked.masked_fill(place >= kept, -torch.inf).float().softmax(1)
            kept = torch.minimum(kept, (share.cumsum(1) - share < top_p).sum(1, keepdim=True).clamp_min(1))
        if min_p is not None:
            likely = (ranked - ranked[:, :1]).float() >= min_p.float().log()
            kept = torch.minimum(kept, likely.sum(1, keepdim=True).clamp_min(1))
        return scores.masked_fill(scores < ranked.gather(1, kept - 1), -torch.inf)


def check_values(
    config: OmniMoeConfig,
    what: str,
    given: Mapping[str, float] | None,
    *,
    least: float | None = None,
    above: float | None = None,
    most: float | None = None,
) -> None:
    """Refuses modalities the model has not, and values out of range.

    Args:
        config: the model's.
        what: name of the option.
        given: value by modality.
        least: smallest value, if it is allowed itself.
        above: what values must exceed.
        most: largest value.

    Raises:
        SpanError: with the value.
    """
    for name, value in (given or {}).items():
        if name not in config.token_ranges:
            raise SpanError(f"{what} names {name!r}; the modalities are {', '.join(config.token_ranges)}")
        low = (least is None or value >= least) and (above is None or value > above)
        if not low or (most is not None and value > most):
            form = f"at least {least}" if least is not None else "positive"
            raise SpanError(f"{what} must be {form}{'' if most is None else f' and at most {most}'}, got {value!r}")
        if value == math.inf:
            raise SpanError(f"{what} must be finite, got {value!r}")


def _by_group(
    given: Mapping[str, float] | None, bounded: Sequence[str], free: Sequence[str], usual: float
) -> Tensor | None:
    if not given:
        return None
    base = next((given[name] for name in free if name in given), usual)
    return torch.tensor([base, *(given.get(name, usual) for name in bounded)])

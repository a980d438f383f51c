"""The loop over ``model.generate``, with randomness of its own for each row.

Noise is drawn row by row and added to the logits, so that the most likely token under it is a sample (the Gumbel-max
trick). What a row gets depends on its own prompt and seed: not on the rows beside it, the size of the batch or the
device.
"""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import Any

import numpy as np
import torch
from torch import Generator, Tensor
from transformers import LogitsProcessor, LogitsProcessorList
from transformers.generation.streamers import BaseStreamer

from omnimoe.generation.media import GenerationError
from omnimoe.generation.prompts import Prompt, pad_prompts, padding_id
from omnimoe.layers.masks import uncached_facts
from omnimoe.model import OmniMoeConfig, OmniMoeForCausalLM
from omnimoe.spans import SpanChoices, SpanReader, bounded_ranges
from omnimoe.spans.guidance import Scale

ByModality = float | Mapping[str, float]
"""One number, or one by modality: ``0.9`` or ``{"image": 1.0, "text": 0.6}``."""


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How tokens are chosen; each is one number for all modalities or one by name.

    Args:
        temperature: 0 takes the most likely token; None is 1.
        top_k: sample among so many tokens; None among all.
        top_p: sample among the most likely tokens that hold this share.
        min_p: sample among tokens at least this share as likely as the likeliest.
        guidance: scale of classifier-free guidance in spans with boundary tokens; 1 and None are none. By name two may
            be given, for discrete modalities: see :class:`~omnimoe.spans.GuidanceProcessor`.
    """

    temperature: ByModality | None = None
    top_k: ByModality | None = None
    top_p: ByModality | None = None
    min_p: ByModality | None = None
    guidance: float | Mapping[str, Scale] | None = None

    @classmethod
    def usual(cls, model: OmniMoeForCausalLM, **given: Any) -> Sampling:
        """The choices that were passed, and for the rest those that come with the model.

        The model's are those of :func:`set_sampling`, in ``model.generation_config.sampling``.

        Args:
            model: with or without choices of its own.
            given: fields of this class; None, or a modality that is missing, leaves it to the model.

        Raises:
            GenerationError: if ``sampling`` has another form, or a value is out of range.
        """
        own = getattr(model.generation_config, "sampling", None) or {}
        known = {field.name for field in dataclasses.fields(cls)}
        if not isinstance(own, Mapping) or not all(isinstance(held, Mapping) for held in own.values()):
            raise GenerationError(f"sampling in the model's generation_config maps modalities to options, got {own!r}")
        if unknown := sorted({what for held in own.values() for what in held} - known):
            raise GenerationError(
                f"sampling in the model's generation_config names {unknown[0]!r}; the options are {', '.join(known)}"
            )
        found = {}
        for what, passed in given.items():
            if passed is None or isinstance(passed, Mapping):
                by_modality = {name: held[what] for name, held in own.items() if held.get(what) is not None}
                passed = {**by_modality, **(passed or {})} or None
            found[what] = passed
        sampling = cls(**found)
        sampling.check(model.config)
        return sampling

    def check(self, config: OmniMoeConfig) -> None:
        """Refuses modalities that the model has not, and values out of range.

        Raises:
            GenerationError: with the value.
        """
        known = config.modality_names
        for what, given in vars(self).items():
            named = given if isinstance(given, Mapping) else {} if given is None else {"": given}
            singles = [
                (name, value)
                for name, held in named.items()
                for value in (held if _is_pair(what, name, held, config) else (held,))
            ]
            for name, value in singles:
                if name and name not in known:
                    raise GenerationError(f"{what} names {name!r}; the modalities are {', '.join(known)}")
                if not isinstance(value, int | float | np.number):
                    raise GenerationError(f"{what} must be a number or numbers by modality, got {value!r}")
                fits, form = {
                    "temperature": (0 <= value < math.inf, "0 or more and finite"),
                    "top_k": (value >= 1 and float(value).is_integer(), "at least 1 and whole"),
                    "top_p": (0 < value <= 1, "in (0, 1]"),
                    "min_p": (0 <= value <= 1, "in [0, 1]"),
                    "guidance": (0 <= value < math.inf, "0 or more and finite"),
                }[what]
                if not fits:
                    raise GenerationError(f"{what} must be {form}, got {value!r}")

    def of(self, name: str) -> dict[str, float]:
        """The choices that hold for a modality, those that change nothing left out; guidance is not among them."""
        found = {what: _of(getattr(self, what), name) for what in ("temperature", "top_k", "top_p", "min_p")}
        if found["temperature"] == 0:
            return {"top_k": 1}
        usual = {"temperature": 1, "top_p": 1, "min_p": 0}
        return {what: value for what, value in found.items() if value is not None and value != usual.get(what)}

    def guidance_of(self, name: str) -> Any:
        """The scale that holds for a modality, or both."""
        given = self.guidance.get(name) if isinstance(self.guidance, Mapping) else self.guidance
        return 1.0 if given is None else given

    def is_greedy(self, names: Sequence[str]) -> bool:
        """Whether some modalities have one answer."""
        return all(_of(self.temperature, name) == 0 for name in names)


def set_sampling(model: OmniMoeForCausalLM, sampling: Mapping[str, Mapping[str, float]]) -> None:
    """Sets how a model is sampled where a call says nothing else; it is saved with the model.

    Args:
        model: any.
        sampling: fields of :class:`Sampling` by modality: ``{"image": {"temperature": 0.9, "guidance": 3.0}}``.

    Raises:
        GenerationError: if a modality or field is unknown, or a value is out of range.
    """
    config = model.generation_config
    before = getattr(config, "sampling", None)
    config.sampling = copy.deepcopy(sampling)
    try:
        Sampling.usual(model, **dict.fromkeys(field.name for field in dataclasses.fields(Sampling)))
    except GenerationError:
        config.sampling = before
        raise
    # transformers drops what the model's config does not say from one that is marked as made of it
    config._from_model_config = False


class Sampler(LogitsProcessor):
    """Sharpens and cuts the logits of each row by its modality, and adds the row's noise.

    Args:
        config: the model's.
        sampling: the choices.
        generators: of the rows, on the CPU; None takes the most likely token.
    """

    supports_continuous_batching = False

    def __init__(self, config: OmniMoeConfig, sampling: Sampling, generators: Sequence[Generator] | None) -> None:
        options: dict[str, dict[str, Any]] = {"temperature": {}, "top_k": {}, "top_p": {}, "min_p": {}}
        for name in config.token_ranges:
            for what, value in sampling.of(name).items():
                options[what][name] = int(value) if what == "top_k" else value
        self._choose = SpanChoices(config, **options)
        self._reader = SpanReader(config)
        self._generators = generators

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """``(B, T)`` ids and ``(B, V)`` logits to logits whose largest is the sample."""
        scores = self._choose(scores.float(), self._reader.state(input_ids)[0])
        if self._generators is None:
            return scores
        noise = torch.stack([torch.empty(scores.shape[1]).exponential_(generator=held) for held in self._generators])
        return scores - noise.log().to(scores.device)


def row_generators(prompts: Sequence[Prompt], seeds: Sequence[int], num_samples: int) -> list[Generator]:
    """A generator for each sample of each document; it depends on prompt, seed and the number of the sample alone."""
    found = []
    for prompt, seed in zip(prompts, seeds, strict=True):
        digest = int.from_bytes(hashlib.blake2b(prompt.ids.numpy().tobytes(), digest_size=8).digest(), "little")
        for number in range(num_samples):
            state = np.random.SeedSequence((seed, digest, number)).generate_state(1, np.uint64)
            found.append(Generator().manual_seed(int(state[0]) >> 1))
    return found


def seeds_of(seed: int | Sequence[int] | None, count: int) -> list[int]:
    """A seed for each of ``count`` documents; fresh ones from the global generator where None.

    Raises:
        GenerationError: if there are not as many as documents, or one is negative.
    """
    if seed is None:
        return torch.randint(2**62, (count,)).tolist()
    seeds = list(seed) if isinstance(seed, Sequence) else [seed] * count
    if len(seeds) != count or any(not isinstance(held, Integral) or held < 0 for held in seeds):
        raise GenerationError(f"seed must be 0 or more, one number or one for each of {count} documents, got {seed!r}")
    return seeds


def sample(
    model: OmniMoeForCausalLM,
    prompts: Sequence[Prompt],
    generators: Sequence[Generator],
    sampling: Sampling,
    *,
    stops: Sequence[int],
    longest: int,
    min_new_tokens: int = 0,
    spans: Sequence[str] | None = None,
    guided: Sequence[str] = (),
    grids: Mapping[str, Sequence[int]] | None = None,
    silent: Sequence[int] = (),
    streamer: BaseStreamer | None = None,
) -> list[tuple[Tensor, int | None]]:
    """Continues a batch of prompts.

    Args:
        model: the model.
        prompts: the rows.
        generators: of the rows.
        sampling: how tokens are chosen.
        stops: tokens that end a row.
        longest: most new tokens.
        min_new_tokens: fewest before a stop.
        spans: modalities that may be opened besides text; None for all.
        guided: modalities where guidance holds.
        grids: rows and columns by modality, for positions in several axes.
        silent: tokens that are never sampled.
        streamer: takes tokens as they come; for one row.

    Returns:
        For each row its new ids ``(n,)`` on the CPU, up to a stop, and that stop, if there was one.
    """
    config, device = model.config, model.device
    batch = pad_prompts(config, prompts)
    features = {name: rows.to(device) for name, rows in batch.pop("features", {}).items()}
    is_greedy = sampling.is_greedy(list(config.token_ranges))
    sampler = Sampler(config, sampling, None if is_greedy else generators)
    scales = {name: sampling.guidance_of(name) for name in guided if name in bounded_ranges(config)}
    given: dict[str, Any] = {"features": features} if features else {}
    made = model.generate(
        batch["input_ids"].to(device),
        attention_mask=batch["attention_mask"].to(device),
        max_new_tokens=longest,
        min_new_tokens=min_new_tokens,
        do_sample=False,
        logits_processor=LogitsProcessorList([sampler]),
        eos_token_id=list(stops) or None,
        pad_token_id=padding_id(config),
        # some rules read what a cache does not keep
        use_cache=not uncached_facts(config.mask),
        spans=spans,
        guidance={name: scale for name, scale in scales.items() if scale != 1} or None,
        grids=grids,
        suppress_tokens=list(silent) or None,
        streamer=streamer,
        **given,
    )
    found: list[tuple[Tensor, int | None]] = []
    for new in made[:, batch["input_ids"].shape[1] :].cpu():
        at = torch.isin(new, torch.tensor(list(stops), dtype=torch.int64)).nonzero()
        found.append((new[: int(at[0])], int(new[int(at[0])])) if len(at) else (new, None))
    return found


def _is_pair(what: str, name: str, held: Any, config: OmniMoeConfig) -> bool:
    """Whether a value is two scales of guidance."""
    is_listed = isinstance(held, tuple | list) and len(held) == 2
    return what == "guidance" and name in config.token_ranges and is_listed


def _of(given: ByModality | None, name: str) -> float | None:
    return given.get(name) if isinstance(given, Mapping) else given

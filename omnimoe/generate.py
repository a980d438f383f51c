"""Tier 9: from any modality to any other. Discrete codes are sampled by transformers' ``generate``; for latents see
:mod:`omnimoe.denoise`.

A prompt is laid out as training documents are (:func:`omnimoe.data.documents.lay_out`), with the begin token of what is
wanted at its end; the grammar of :mod:`omnimoe.spans` does the rest.

With a cache, routers of expert choice route by their cut-off and not by rank, since a row may not depend on others.
"""

from __future__ import annotations

import contextlib
import wave
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from omnimoe.data.documents import lay_out
from omnimoe.data.tokenize import TOKENIZERS
from omnimoe.denoise import denoise
from omnimoe.layers.masks import is_causal_rule, uncached_facts
from omnimoe.model import OmniMoeConfig, OmniMoeForCausalLM
from omnimoe.spans import bounded_ranges, owned_rows, read_spans
from omnimoe.tokenizers import Tokenizer, load_tokenizer
from omnimoe.tokenizers.speech import SAMPLE_RATE

__all__ = ["Generated", "GenerationError", "denoise", "generate", "interleave", "read_wave"]

LONGEST_TEXT = 128
"""Tokens of a text, where the caller sets no other limit."""
LONGEST_SPAN = 250
"""Tokens of a span of free length, ten seconds of speech, where the caller sets no other limit."""

Document = Mapping[str, Any] | Sequence[tuple[str, Any]]
"""Modality and raw input, in order: ``{"text": "a red apple"}`` or ``[("text", "a red"), ("image", pixels)]``."""


class GenerationError(ValueError):
    """A model, a modality or an input that cannot be generated from or to."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Generated:
    """One generated span.

    Args:
        modality: its modality.
        ids: ``(n,)`` int64 local ids, as the modality's tokenizer has them.
        raw: what they decode to: a str, a picture ``(H, W, 3)`` uint8, or a waveform ``(samples,)`` float32.
        sample_rate: of a waveform in Hz, else None.
    """

    modality: str
    ids: Tensor
    raw: Any
    sample_rate: int | None = None

    def save(self, path: str | PathLike[str]) -> Path:
        """Writes the raw output: text as UTF-8, a picture in the format of the ending, a waveform as 16-bit WAV.

        Returns:
            The path.

        Raises:
            GenerationError: if the ending does not fit the modality.
        """
        path = Path(path)
        if isinstance(self.raw, str):
            path.write_text(self.raw + "\n", encoding="utf-8")
        elif self.sample_rate is not None:
            if path.suffix.lower() != ".wav":
                raise GenerationError(f"speech is written as .wav, not as {path.name!r}; change the ending")
            with wave.open(str(path), "wb") as file:
                file.setnchannels(1)
                file.setsampwidth(2)
                file.setframerate(self.sample_rate)
                file.writeframes((self.raw.clip(-1, 1) * 32767).round().astype("<i2").tobytes())
        else:
            endings = Image.registered_extensions()
            if endings.get(path.suffix.lower()) not in Image.SAVE:
                raise GenerationError(f"a picture is written as .png, .jpg or .webp, not as {path.name!r}")
            Image.fromarray(self.raw).save(path)
        return path


def read_wave(path: str | PathLike[str]) -> tuple[np.ndarray, int]:
    """Reads a WAV file, for ``("speech", read_wave(path))``.

    Args:
        path: of 8, 16, 24 or 32-bit PCM; channels are averaged.

    Returns:
        ``(samples,)`` float32 in [-1, 1], and the rate in Hz. The speech tokenizer resamples other rates than its own.

    Raises:
        GenerationError: if there is no such file, or it is no PCM WAV file.
    """
    try:
        with wave.open(str(path), "rb") as file:
            channels, width, rate = file.getnchannels(), file.getsampwidth(), file.getframerate()
            data = file.readframes(file.getnframes())
    except FileNotFoundError:
        raise GenerationError(f"no sound at {path}") from None
    except (wave.Error, EOFError, OSError) as error:
        raise GenerationError(f"{path} is not a PCM WAV file: {error or 'it ends early'}; convert it first") from None
    samples = np.frombuffer(data[: len(data) // (channels * width) * channels * width], np.uint8).reshape(-1, width)
    # A sample's bytes go to the top of 32 bits, the lowest first; 8-bit samples are unsigned.
    wide = np.zeros((len(samples), 4), np.uint8)
    wide[:, 4 - width :] = samples if width > 1 else samples ^ 0x80
    waveform = wide.view("<i4").reshape(-1, channels).astype(np.float32) / 2**31
    return waveform.mean(axis=1), rate


def generate(
    model: OmniMoeForCausalLM,
    inputs: Document | Sequence[Document],
    to: str,
    *,
    tokenizers: Mapping[str, Tokenizer] | None = None,
    seed: int | None = None,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    max_new_tokens: int | None = None,
    num_samples: int = 1,
) -> list[Generated]:
    """Generates a span of one modality after spans of others.

    Args:
        model: over a partitioned vocabulary; put it in evaluation mode first.
        inputs: one document or a list of documents; raw inputs are what the tokenizer's ``encode`` takes, with a tuple
            for several arguments: ``("speech", (waveform, 44_100))``. An empty document generates from nothing.
        to: the modality wanted.
        tokenizers: modality to tokenizer; those that ship with the package where a name is missing.
        seed: repeats exactly for the same inputs, in the same batch, on the same device; the global generator is left
            as it was. None draws from the global generator.
        temperature: of sampling; 0 takes the most likely token.
        top_k: sample among so many tokens; None among all.
        top_p: sample among the most likely tokens that hold this share; None among all.
        max_new_tokens: longest output in tokens, for modalities of free length; 128 for text and 250 for others where
            None. The text also ends where the model would begin another span.
        num_samples: outputs for each document.

    Returns:
        ``num_samples`` for each document, document by document.

    Raises:
        GenerationError: if the model cannot generate the modality, an input is empty, or an option is out of range.
        TokenizerError: if a raw input is not of its modality.
    """
    config = model.config
    _check_model(config)
    _check_target(config, to)
    held = config.token_ranges[to]
    loaded = _load(config, tokenizers, {to, *(name for document in _documents(inputs) for name, _ in document)})
    prompts = [_prompt(config, document, loaded, opened=to) for document in _documents(inputs)]
    if held.num_tokens is not None and max_new_tokens not in (None, held.num_tokens):
        raise GenerationError(
            f"a span of {to} has {held.num_tokens} tokens, so max_new_tokens cannot be {max_new_tokens}"
        )
    longest = held.num_tokens or max_new_tokens or (LONGEST_TEXT if held.begin_id is None else LONGEST_SPAN)
    begins = [other.begin_id for other in bounded_ranges(config).values() if other.begin_id is not None]
    stops = [*_ids(config.eos_token_id), *begins] if held.end_id is None else [held.end_id]
    sequences = _sample(model, prompts, stops, longest, seed, temperature, top_k, top_p, num_samples, min_new_tokens=1)
    rows = owned_rows(config)[to]
    return [_decoded(to, ids[rows[ids]] - held.start, loaded[to]) for ids in sequences]


def interleave(
    model: OmniMoeForCausalLM,
    inputs: Document | Sequence[Document],
    *,
    spans: Sequence[str] | None = None,
    tokenizers: Mapping[str, Tokenizer] | None = None,
    seed: int | None = None,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    max_new_tokens: int = 512,
    num_samples: int = 1,
) -> list[list[Generated]]:
    """Continues documents in whatever modalities the model chooses, until it ends them.

    Args:
        model: as in :func:`generate`; so are the other arguments.
        inputs: see there.
        spans: modalities it may open besides text; None for all.
        tokenizers: see there.
        seed: see there.
        temperature: see there.
        top_k: see there.
        top_p: see there.
        max_new_tokens: longest continuation, boundary tokens included.
        num_samples: continuations of each document.

    Returns:
        The spans of each continuation in order. A picture that the limit cut short is left out.

    Raises:
        GenerationError: as :func:`generate`.
    """
    config = model.config
    _check_model(config)
    loaded = _load(config, tokenizers, set(config.token_ranges))
    prompts = [_prompt(config, document, loaded) for document in _documents(inputs)]
    stops = _ids(config.eos_token_id)
    given = (model, prompts, stops, max_new_tokens, seed, temperature, top_k, top_p, num_samples)
    found = []
    for ids in _sample(*given, min_new_tokens=0, spans=spans):
        whole = [span for span in read_spans(ids, config) if span.is_whole or loaded[span.modality].num_tokens is None]
        found.append([_decoded(span.modality, span.ids, loaded[span.modality]) for span in whole])
    return found


def _documents(inputs: Document | Sequence[Document]) -> list[list[tuple[str, Any]]]:
    is_pair = lambda item: isinstance(item, tuple) and len(item) == 2 and isinstance(item[0], str)  # noqa: E731
    single = isinstance(inputs, Mapping) or not inputs or all(is_pair(item) for item in inputs)
    documents = [
        list(held.items()) if isinstance(held, Mapping) else list(held) for held in ([inputs] if single else inputs)
    ]
    for item in (item for document in documents for item in document):
        if not is_pair(item):
            raise GenerationError(f"a document is a list of (modality, raw input), but it holds {str(item)[:60]!r}")
    return documents


def _check_model(config: OmniMoeConfig) -> None:
    if not is_causal_rule(config.mask) and config.mask != "block_causal":
        raise GenerationError(f"the model's mask rule is {config.mask!r}; only causal models generate token by token")
    for block in config.blocks:
        rope = getattr(block.attention, "rope", None)
        if rope is not None and len(rope.sections) > 1:
            raise GenerationError(
                f"the model's positions have {len(rope.sections)} axes, and only one axis can be continued; "
                "call model.generate with position_ids of your own"
            )


def _check_target(config: OmniMoeConfig, to: str) -> None:
    ranges = config.token_ranges
    if to not in config.modality_names:
        raise GenerationError(f"the model has no modality {to!r}; it has {', '.join(config.modality_names)}")
    if to not in ranges:
        raise GenerationError(f"{to!r} is continuous and not sampled token by token; call denoise")
    if to in config.bidirectional_modalities:
        raise GenerationError(
            f"the model sees spans of {to!r} in both directions, so they have no first token to sample"
        )
    if ranges[to].begin_id is None and to != next(iter(ranges)):
        raise GenerationError(f"{to!r} has no begin_id in the model's config, so nothing says where a span begins")


def _load(config: OmniMoeConfig, given: Mapping[str, Tokenizer] | None, names: set[str]) -> dict[str, Tokenizer]:
    """The tokenizers of some modalities, each checked against the model's range."""
    loaded = {}
    for name in sorted(names):
        if name not in config.token_ranges:
            known = ", ".join(config.token_ranges)
            raise GenerationError(f"the model has no discrete modality {name!r}; it has {known}")
        tokenizer = (given or {}).get(name)
        if tokenizer is None:
            if name not in TOKENIZERS:
                raise GenerationError(f"no tokenizer ships for {name!r}; pass tokenizers={{{name!r}: ...}}")
            tokenizer = load_tokenizer(TOKENIZERS[name])
        held = config.token_ranges[name]
        if (tokenizer.vocab_size, tokenizer.num_tokens) != (held.size, held.num_tokens):
            raise GenerationError(
                f"the tokenizer of {name!r} has {tokenizer.vocab_size} ids and spans of {tokenizer.num_tokens or 'any'}"
                f" tokens, the model {held.size} and {held.num_tokens or 'any'}; pass the one it was trained with"
            )
        loaded[name] = tokenizer
    return loaded


def _prompt(
    config: OmniMoeConfig,
    document: list[tuple[str, Any]],
    tokenizers: Mapping[str, Tokenizer],
    opened: str | None = None,
) -> Tensor:
    """``(T,)`` int64: begin of document, the spans, and the begin token of what is wanted."""
    spans = []
    for name, raw in document:
        ids = tokenizers[name].encode(*raw) if isinstance(raw, tuple) else tokenizers[name].encode(raw)
        if not len(ids):
            raise GenerationError(f"the {name} input {str(raw)[:40]!r} is empty; leave it out to generate without it")
        spans.append((name, ids.numpy()))
    ids = lay_out(spans, config.token_ranges, bos_id=config.bos_token_id, opened=opened).ids
    if not len(ids):
        raise GenerationError("nothing to start from: the model has no bos_token_id; pass an input")
    return torch.from_numpy(ids)


def _sample(
    model: OmniMoeForCausalLM,
    prompts: list[Tensor],
    stops: list[int],
    longest: int,
    seed: int | None,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    num_samples: int,
    *,
    min_new_tokens: int,
    spans: Sequence[str] | None = None,
) -> list[Tensor]:
    """The new ids of each sample, up to the first of ``stops``, on the CPU."""
    if temperature < 0 or num_samples < 1 or longest < 1:
        raise GenerationError(
            f"temperature must be 0 or more, num_samples and max_new_tokens at least 1, "
            f"got {temperature}, {num_samples} and {longest}"
        )
    if (top_k is not None and top_k < 1) or (top_p is not None and not 0 < top_p <= 1):
        raise GenerationError(f"top_k must be at least 1 and top_p in (0, 1], got {top_k} and {top_p}")
    if temperature == 0 and num_samples > 1:
        raise GenerationError(f"temperature 0 has one answer, not {num_samples}; raise it or ask for one sample")
    config, length = model.config, max(map(len, prompts))
    if length > config.max_position_embeddings:
        raise GenerationError(
            f"the prompt has {length} tokens, and the model was made for {config.max_position_embeddings}; "
            "shorten the input"
        )
    pad = next(iter([*_ids(config.pad_token_id), *_ids(config.eos_token_id), 0]))
    ids = torch.full((len(prompts), length), pad)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, length - len(prompt) :] = prompt
        mask[row, length - len(prompt) :] = 1
    options: dict[str, Any] = {"do_sample": temperature > 0}
    if temperature > 0:
        options |= {"temperature": temperature, "top_k": top_k or 0, "top_p": top_p or 1.0}
    with _seeded(seed, model.device):
        made = model.generate(
            ids.to(model.device),
            attention_mask=mask.to(model.device),
            max_new_tokens=longest,
            min_new_tokens=min_new_tokens,
            num_return_sequences=num_samples,
            eos_token_id=stops or None,
            pad_token_id=pad,
            # some rules read what a cache does not keep
            use_cache=not uncached_facts(config.mask),
            spans=spans,
            **options,
        )
    found = []
    for new in made[:, length:].cpu():
        at = torch.isin(new, torch.tensor(stops, dtype=torch.int64)).nonzero()
        found.append(new[: int(at[0])] if len(at) else new)
    return found


def _decoded(name: str, ids: Tensor, tokenizer: Tokenizer) -> Generated:
    raw = tokenizer.decode(ids)
    is_sound = isinstance(raw, np.ndarray) and raw.ndim == 1
    return Generated(
        modality=name, ids=ids, raw=raw, sample_rate=(tokenizer.sample_rate or SAMPLE_RATE) if is_sound else None
    )


@contextlib.contextmanager
def _seeded(seed: int | None, device: torch.device) -> Iterator[None]:
    if seed is None:
        yield
        return
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield


def _ids(token: int | Sequence[int] | None) -> list[int]:
    return [] if token is None else [token] if isinstance(token, int) else list(token)

"""Tier 9: from any modality to any other. Discrete codes are sampled by transformers' ``generate``, latents denoised.

A prompt is laid out as training documents are (:func:`omnimoe.data.documents.lay_out`), with the begin token of what is
wanted at its end; the grammar of :mod:`omnimoe.spans` does the rest.

With a cache, routers of expert choice route by their cut-off and not by rank, since a row may not depend on others.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Generator, Tensor

from omnimoe.denoise import denoise
from omnimoe.generation import ANY
from omnimoe.generation.latents import draw_latents, with_span
from omnimoe.generation.media import Generated, GenerationError, read_wave
from omnimoe.generation.prompts import (
    Document,
    Prompt,
    check_model,
    check_target,
    documents_of,
    encode_document,
    grids_of,
    lay_out_prompt,
    load_tokenizers,
    own_tokenizers,
    token_ids,
)
from omnimoe.generation.ranking import log_likelihood
from omnimoe.generation.sampling import ByModality, Sampling, row_generators, sample, seeds_of, set_sampling
from omnimoe.generation.streaming import TextSpanStreamer
from omnimoe.inputs import check_whole
from omnimoe.model import OmniMoeConfig, OmniMoeForCausalLM
from omnimoe.spans import bounded_ranges, owned_rows, read_spans
from omnimoe.spans.guidance import Scale
from omnimoe.tokenizers import Tokenizer

__all__ = [
    "Generated",
    "GenerationError",
    "TextSpanStreamer",
    "denoise",
    "generate",
    "interleave",
    "log_likelihood",
    "read_wave",
    "set_sampling",
]

LONGEST_TEXT = 128
"""Tokens of a text, where the caller sets no other limit."""
LONGEST_SPAN = 250
"""Tokens of a span of free length, ten seconds of speech, where the caller sets no other limit."""
LONGEST_DOCUMENT = 512
"""Tokens of a continued document, where neither the caller nor the model sets another limit."""
STEPS = 50
"""Steps of the sampler of continuous modalities."""
BATCH_SIZE = 32
"""Rows that are generated at once."""


def generate(
    model: OmniMoeForCausalLM,
    inputs: Document | Sequence[Document],
    to: str,
    *,
    tokenizers: Mapping[str, Tokenizer] | None = None,
    seed: int | Sequence[int] | None = None,
    temperature: ByModality | None = None,
    top_k: ByModality | None = None,
    top_p: ByModality | None = None,
    min_p: ByModality | None = None,
    guidance: float | Mapping[str, Scale] | None = None,
    steps: int | None = None,
    max_new_tokens: int | None = None,
    num_samples: int = 1,
    best_of: int | None = None,
    batch_size: int = BATCH_SIZE,
    on_text: Callable[[str], Any] | None = None,
) -> list[Any]:
    """Generates a span of one modality after spans of others.

    Args:
        model: over a partitioned vocabulary; put it in evaluation mode first.
        inputs: one document or a list of documents; raw inputs are what the tokenizer's ``encode`` takes, with a tuple
            for several arguments: ``("speech", (waveform, 44_100))``. An empty document generates from nothing.
        to: the modality wanted, or ``"any"`` for what :func:`interleave` does.
        tokenizers: modality to tokenizer; where a name is missing, that which is a part of the model, or ships with
            the package.
        seed: repeats exactly. The n-th sample of a document depends on the seed, n and the document, and not on what
            else is in the batch, so a document that stands there twice is answered twice alike; a list gives each
            document its own seed. None draws seeds from the global generator, which is otherwise left as it was.
        temperature: of sampling; 0 takes the most likely token. This and the next four are numbers, or numbers by
            modality; None takes what :func:`set_sampling` gave the model, and where that says nothing, 1.
        top_k: sample among so many tokens; else among all.
        top_p: sample among the most likely tokens that hold this share; else among all.
        min_p: sample among tokens at least this share as likely as the likeliest; else among all.
        guidance: scale of classifier-free guidance by a second forward that sees the span alone; 1 is none. For
            modalities with boundary tokens and continuous ones. By name it may be two, away from the document without
            its words and that away from the span alone, for discrete modalities.
        steps: forwards of the sampler, for a continuous modality; 50 where None.
        max_new_tokens: longest output in tokens, for modalities of free length; 128 for text and 250 for others where
            None. The text also ends where the model would begin another span.
        num_samples: outputs for each document.
        best_of: draw so many candidates for each document and keep the ``num_samples`` under which the model finds the
            document's inputs most likely, the likeliest first.
        batch_size: rows that are generated at once.
        on_text: takes text as it is written, word by word; for one output.

    Returns:
        ``num_samples`` for each document, document by document; of ``"any"`` each is a list of spans.

    Raises:
        GenerationError: if the model cannot generate the modality, an input is empty, or an option is out of range.
        TokenizerError: if a raw input is not of its modality.
    """
    config = model.config
    if to == ANY:
        if best_of is not None:
            raise GenerationError("best_of is for one modality, not for to='any'; leave it out")
        return interleave(
            model,
            inputs,
            tokenizers=tokenizers,
            seed=seed,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            min_p=min_p,
            guidance=guidance,
            steps=steps,
            max_new_tokens=max_new_tokens,
            num_samples=num_samples,
            batch_size=batch_size,
            on_text=on_text,
        )
    check_model(config)
    check_target(config, to)
    documents = documents_of(inputs)
    sampling = Sampling.usual(model, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, guidance=guidance)
    drawn = num_samples if best_of is None else best_of
    is_discrete = to in config.token_ranges
    longest = _longest(config, to, max_new_tokens)
    steps = _steps(config, to, steps)
    _check_counts(num_samples, drawn, batch_size, steps, longest)
    if drawn > 1 and is_discrete and sampling.is_greedy([to]):
        raise GenerationError(f"temperature 0 has one answer, not {drawn}; raise it or ask for one sample")
    if is_discrete and to not in bounded_ranges(config) and sampling.guidance_of(to) != 1:
        raise GenerationError(f"{to} has no boundary tokens, so no part of it stands alone; leave guidance out")
    loaded = load_tokenizers(
        config, own_tokenizers(model, tokenizers), {to, *(name for document in documents for name, _ in document)}
    )
    grids = grids_of(config, loaded)
    spans = [encode_document(config, document, loaded) for document in documents]
    prompts = [lay_out_prompt(config, held, opened=to) for held in spans]
    rows = [prompt for prompt in prompts for _ in range(drawn)]
    generators = row_generators(prompts, seeds_of(seed, len(prompts)), drawn)
    streamer = _streamer(config, to, loaded, on_text, len(rows))

    made: list[Tensor] = []
    for start in range(0, len(rows), batch_size):
        part = slice(start, start + batch_size)
        if is_discrete:
            stops = _stops(config, to)
            options: dict[str, Any] = {
                "stops": stops,
                "longest": longest,
                "min_new_tokens": 1,
                "guided": (to,),
                "grids": grids,
            }
            found = sample(model, rows[part], generators[part], sampling, streamer=streamer, **options)
            made += [_local(config, to, ids) for ids, _ in found]
        else:
            scale = sampling.guidance_of(to)
            made += draw_latents(model, to, rows[part], generators[part], steps=steps, guidance=scale, grids=grids)
    if best_of is None:
        return [decoded(to, held, loaded[to]) for held in made]
    pairs = [([(to, held)], spans[place // drawn]) for place, held in enumerate(made)]
    scores = log_likelihood(model, pairs, batch_size=batch_size, grids=grids)
    kept: list[Generated] = []
    for start in range(0, len(made), drawn):
        best = sorted(range(start, start + drawn), key=lambda place: -scores[place])[:num_samples]
        kept += [dataclasses.replace(decoded(to, made[place], loaded[to]), score=scores[place]) for place in best]
    return kept


def interleave(
    model: OmniMoeForCausalLM,
    inputs: Document | Sequence[Document],
    *,
    spans: Sequence[str] | None = None,
    tokenizers: Mapping[str, Tokenizer] | None = None,
    seed: int | Sequence[int] | None = None,
    temperature: ByModality | None = None,
    top_k: ByModality | None = None,
    top_p: ByModality | None = None,
    min_p: ByModality | None = None,
    guidance: float | Mapping[str, Scale] | None = None,
    steps: int | None = None,
    max_new_tokens: int | None = None,
    num_samples: int = 1,
    batch_size: int = BATCH_SIZE,
    on_text: Callable[[str], Any] | None = None,
) -> list[list[Generated]]:
    """Continues documents in whatever modalities the model chooses, until it ends them.

    Args:
        model: as in :func:`generate`; so are the other arguments.
        inputs: see there.
        spans: modalities it may open besides text; None for all.
        tokenizers: see there.
        seed: see there.
        temperature: see there; values by modality hold inside the spans of each.
        top_k: see there.
        top_p: see there.
        min_p: see there.
        guidance: see there; one number holds for all spans with boundary tokens, and for continuous ones.
        steps: see there.
        max_new_tokens: longest continuation, boundary tokens and continuous spans included; 512 where None, or what the
            length leaves that the model was made for.
        num_samples: continuations of each document.
        batch_size: see there.
        on_text: see there.

    Returns:
        The spans of each continuation in order. A picture that the limit cut short is left out.

    Raises:
        GenerationError: as :func:`generate`.
    """
    config = model.config
    check_model(config)
    sampling = Sampling.usual(model, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, guidance=guidance)
    steps = _steps(config, ANY, steps)
    _check_counts(num_samples, num_samples, batch_size, steps, 1 if max_new_tokens is None else max_new_tokens)
    if num_samples > 1 and sampling.is_greedy(config.modality_names):
        raise GenerationError(f"temperature 0 has one answer, not {num_samples}; raise it or ask for one sample")
    documents = documents_of(inputs)
    wanted = {*config.token_ranges, *_opened(config).values()}
    loaded = load_tokenizers(
        config, own_tokenizers(model, tokenizers), wanted | {name for document in documents for name, _ in document}
    )
    prompts = [lay_out_prompt(config, encode_document(config, held, loaded)) for held in documents]
    rows = [prompt for prompt in prompts for _ in range(num_samples)]
    generators = row_generators(prompts, seeds_of(seed, len(prompts)), num_samples)
    streamer = _streamer(config, next(iter(config.token_ranges)), loaded, on_text, len(rows))
    options: dict[str, Any] = {
        "spans": spans,
        "guided": tuple(bounded_ranges(config)),
        "grids": grids_of(config, loaded),
    }

    room = config.max_position_embeddings - max((len(prompt.ids) for prompt in prompts), default=0)
    longest = max_new_tokens if max_new_tokens is not None else max(1, min(LONGEST_DOCUMENT, room))
    opened = _opened(config)
    stops = [*token_ids(config.eos_token_id), *opened]

    def go_on(part: list[Prompt], own: list[Generator], most: int) -> list[tuple[Tensor, int | None]]:
        return sample(model, part, own, sampling, stops=stops, longest=most, streamer=streamer, **options)

    def read(ids: Tensor) -> list[Generated]:
        found = [(span, loaded[span.modality]) for span in read_spans(ids, config)]
        return [
            decoded(span.modality, span.ids, tokenizer)
            for span, tokenizer in found
            if span.is_whole or (tokenizer.num_tokens is None and len(span.ids) >= tokenizer.frame_size)
        ]

    found: list[list[Generated]] = []
    for start in range(0, len(rows), batch_size):
        part, own = rows[start : start + batch_size], generators[start : start + batch_size]
        for prompt, generator, (ids, stop) in zip(part, own, go_on(part, own, longest), strict=True):
            held, left = read(ids), longest - len(ids)
            # where a continuous span begins, it is denoised, and the row goes on alone
            while stop is not None and stop in opened:
                name = opened[stop]
                prompt = prompt.then(torch.cat((ids, torch.tensor([stop]))))
                left -= 1 + (config.modalities[config.modality_names.index(name)].num_tokens or 0)
                if left < 0:
                    break
                scale = sampling.guidance_of(name)
                (latent,) = draw_latents(
                    model, name, [prompt], [generator], steps=steps, guidance=scale, grids=options["grids"]
                )
                held.append(decoded(name, latent, loaded[name]))
                prompt = with_span(model, name, prompt, latent)
                if left == 0:
                    break
                ((ids, stop),) = go_on([prompt], [generator], left)
                held, left = held + read(ids), left - len(ids)
            found.append(held)
    return found


def decoded(name: str, held: Tensor, tokenizer: Tokenizer) -> Generated:
    """Local ids ``(n,)`` or rows ``(n, C)`` of a modality with what they decode to."""
    if held.is_floating_point():
        return Generated(modality=name, rows=held, raw=tokenizer.decode_rows(held), sample_rate=tokenizer.sample_rate)
    return Generated(modality=name, ids=held, raw=tokenizer.decode(held), sample_rate=tokenizer.sample_rate)


def _check_counts(num_samples: int, drawn: int, batch_size: int, steps: int, longest: int) -> None:
    given = {"num_samples": num_samples, "best_of": drawn, "batch_size": batch_size}
    given |= {"steps": steps, "max_new_tokens": longest}
    for what, value in given.items():
        check_whole(what, value, error=GenerationError)
    if drawn < num_samples:
        raise GenerationError(f"best_of must be at least num_samples, {num_samples}, got {drawn}")


def _steps(config: OmniMoeConfig, to: str, asked: int | None) -> int:
    """The steps that are taken; they are refused where nothing is denoised."""
    denoised = [name for name in config.modality_names if name not in config.token_ranges]
    if asked is not None and not (denoised if to == ANY else to in denoised):
        raise GenerationError(f"steps is for what is denoised; the model makes {to} token by token; leave it out")
    return STEPS if asked is None else asked


def _longest(config: OmniMoeConfig, to: str, asked: int | None) -> int:
    held = config.modalities[config.modality_names.index(to)]
    if held.num_tokens is None and held.frame_size > 1:
        if asked is not None and asked < held.frame_size:
            raise GenerationError(f"a frame of {to} has {held.frame_size} tokens, so max_new_tokens cannot be {asked}")
        return (asked or max(LONGEST_SPAN, held.frame_size)) // held.frame_size * held.frame_size
    if held.num_tokens is None:
        return asked if asked is not None else LONGEST_TEXT if held.begin_id is None else LONGEST_SPAN
    if asked not in (None, held.num_tokens):
        raise GenerationError(f"a span of {to} has {held.num_tokens} tokens, so max_new_tokens cannot be {asked}")
    return held.num_tokens


def _stops(config: OmniMoeConfig, to: str) -> list[int]:
    """What ends a span; text also ends where another span would begin."""
    held = config.token_ranges[to]
    if held.end_id is not None:
        return [held.end_id]
    begins = [part.begin_id for part in config.modalities if part.begin_id is not None and part.end_id is not None]
    return [*token_ids(config.eos_token_id), *begins]


def _local(config: OmniMoeConfig, to: str, ids: Tensor) -> Tensor:
    return ids[owned_rows(config)[to][ids]] - config.token_ranges[to].start


def _opened(config: OmniMoeConfig) -> dict[int, str]:
    """Begin tokens of the continuous modalities that can be denoised behind them."""
    continuous = [held for held in config.modalities if not held.is_discrete]
    can = [held for held in continuous if held.num_tokens is not None and held.placeholder_id is not None]
    return {held.begin_id: held.name for held in can if held.begin_id is not None}


def _streamer(
    config: OmniMoeConfig,
    name: str,
    tokenizers: Mapping[str, Tokenizer],
    write: Callable[[str], Any] | None,
    num_rows: int,
) -> TextSpanStreamer | None:
    if write is None:
        return None
    if num_rows != 1 or name not in config.token_ranges or config.token_ranges[name].begin_id is not None:
        raise GenerationError(f"text is streamed for one output of text, not for {num_rows} of {name}; drop on_text")
    return TextSpanStreamer(config, tokenizers[name], write, name=name)

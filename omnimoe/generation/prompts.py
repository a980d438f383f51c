"""Documents to prompts: raw inputs are encoded and laid out as training documents are.

A prompt ends with the begin token of what is wanted. Continuous inputs stand as placeholders, with their rows beside.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from omnimoe.data.documents import lay_out
from omnimoe.generation.media import GenerationError
from omnimoe.layers.masks import is_causal_rule
from omnimoe.modalities import CodedPictures, TokenRange
from omnimoe.model import OmniMoeConfig, OmniMoeForCausalLM
from omnimoe.spans import position_axes
from omnimoe.tokenizers import SHIPPED, Tokenizer, load_tokenizer

Document = Mapping[str, Any] | Sequence[tuple[str, Any]]
"""Modality and raw input, in order: ``{"text": "a red apple"}`` or ``[("text", "a red"), ("image", pixels)]``."""

PICTURES = {64: "picture", 256: "picture_128"}
"""Picture tokenizers by the codes of a picture."""
CONTINUOUS = {"image": "picture_latents"}
"""Continuous tokenizers that ship."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Prompt:
    """The start of a document.

    Args:
        ids: ``(T,)`` int64, rows of the vocabulary.
        features: rows ``(n, C)`` of its continuous spans, in order, by modality.
    """

    ids: Tensor
    features: Mapping[str, Tensor] = field(default_factory=dict)

    def then(self, ids: Tensor, features: Mapping[str, Tensor] | None = None) -> Prompt:
        """The same with more behind it."""
        held = dict(self.features)
        for name, rows in (features or {}).items():
            held[name] = torch.cat((held[name], rows)) if name in held else rows
        return Prompt(ids=torch.cat((self.ids, ids)), features=held)


def documents_of(inputs: Document | Sequence[Document]) -> list[list[tuple[str, Any]]]:
    """One document or several, as lists of pairs.

    Raises:
        GenerationError: if a document holds anything else.
    """
    is_pair = lambda item: isinstance(item, tuple) and len(item) == 2 and isinstance(item[0], str)  # noqa: E731
    single = isinstance(inputs, Mapping) or not inputs or all(is_pair(item) for item in inputs)
    documents = [
        list(held.items()) if isinstance(held, Mapping) else list(held) for held in ([inputs] if single else inputs)
    ]
    for item in (item for document in documents for item in document):
        if not is_pair(item):
            raise GenerationError(f"a document is a list of (modality, raw input), but it holds {str(item)[:60]!r}")
    return documents


def check_model(config: OmniMoeConfig) -> None:
    """Refuses models that do not generate token by token.

    Raises:
        GenerationError: if the mask rule looks ahead, or positions have axes that nobody lays out.
    """
    if not is_causal_rule(config.mask) and config.mask != "block_causal":
        raise GenerationError(f"the model's mask rule is {config.mask!r}; only causal models generate token by token")
    if position_axes(config) not in (1, 3):
        raise GenerationError(
            f"the model's positions have {position_axes(config)} axes, and documents are laid out in 1 or 3; "
            "call model.generate with position_ids of your own"
        )


def check_modality(config: OmniMoeConfig, name: str) -> None:
    """Refuses names that are no modality of the model.

    Raises:
        GenerationError: with the modalities there are.
    """
    if name not in config.modality_names:
        raise GenerationError(f"the model has no modality {name!r}; it has {', '.join(config.modality_names)}")


def check_target(config: OmniMoeConfig, to: str) -> None:
    """Refuses modalities that have no first token to sample and no rows to denoise.

    Raises:
        GenerationError: with the modalities there are.
    """
    check_modality(config, to)
    held = config.modalities[config.modality_names.index(to)]
    if not held.is_discrete:
        if held.num_tokens is None or held.placeholder_id is None:
            raise GenerationError(
                f"spans of {to!r} cannot be laid out without num_tokens and placeholder_id in the config; call denoise"
            )
    elif to in config.bidirectional_modalities:
        raise GenerationError(
            f"the model sees spans of {to!r} in both directions, so they have no first token to sample"
        )
    elif held.begin_id is None and to != next(iter(config.token_ranges)):
        raise GenerationError(f"{to!r} has no begin_id in the model's config, so nothing says where a span begins")


def own_tokenizers(model: OmniMoeForCausalLM, given: Mapping[str, Tokenizer] | None = None) -> dict[str, Tokenizer]:
    """The tokenizers that were passed, and those that are a part of the model for modalities that are missing."""
    parts = model.model.modalities.items()
    return {name: held.tokenizer for name, held in parts if isinstance(held, CodedPictures)} | dict(given or {})


def load_tokenizers(
    config: OmniMoeConfig, given: Mapping[str, Tokenizer] | None, names: Iterable[str]
) -> dict[str, Tokenizer]:
    """The tokenizers of some modalities, each checked against the model's.

    Args:
        config: the model's.
        given: modality to tokenizer; those that ship with the package where a name is missing.
        names: modalities wanted.

    Raises:
        GenerationError: if a modality is unknown, or a tokenizer has other ids, rows or lengths than the model.
    """
    loaded = {}
    for name in sorted(set(names)):
        check_modality(config, name)
        tokenizer = (given or {}).get(name)
        if tokenizer is None:
            ships = shipped_tokenizer(config, name)
            if ships is None:
                raise GenerationError(f"no tokenizer ships for {name!r}; pass tokenizers={{{name!r}: ...}}")
            tokenizer = load_tokenizer(ships)
        _check_tokenizer(config, name, tokenizer)
        loaded[name] = tokenizer
    return loaded


def shipped_tokenizer(config: OmniMoeConfig, name: str) -> str | None:
    """The registered name of the tokenizer that ships for a modality of this form, or None."""
    part = config.modalities[config.modality_names.index(name)]
    if not part.is_discrete:
        return CONTINUOUS.get(name)
    return PICTURES.get(part.num_tokens or 0, SHIPPED[name]) if name == "image" else SHIPPED.get(name)


def _check_tokenizer(config: OmniMoeConfig, name: str, tokenizer: Tokenizer) -> None:
    part = config.modalities[config.modality_names.index(name)]
    if part.is_discrete:
        what, has, needs = "ids", tokenizer.vocab_size, config.token_ranges[name].size
    else:
        what, has, needs = "channels", tokenizer.channels or 0, getattr(part, "channels", 0)
    if (has, tokenizer.num_tokens, tokenizer.frame_size) != (needs, part.num_tokens, part.frame_size):
        raise GenerationError(
            f"the tokenizer of {name!r} has {has} {what}, spans of {tokenizer.num_tokens or 'any'} tokens and frames "
            f"of {tokenizer.frame_size}, the model {needs}, {part.num_tokens or 'any'} and {part.frame_size}; pass the "
            "one it was trained with"
        )


def grids_of(config: OmniMoeConfig, tokenizers: Mapping[str, Tokenizer]) -> dict[str, tuple[int, ...]] | None:
    """Rows and columns of the modalities with positions in space, or None for a model with one axis."""
    if position_axes(config) == 1:
        return None
    return {name: held.grid for name, held in tokenizers.items() if held.grid is not None and len(held.grid) == 2}


def layout_ranges(config: OmniMoeConfig) -> dict[str, TokenRange]:
    """A range for every modality, in order; a continuous one has its placeholder alone."""
    discrete, found = config.token_ranges, {}
    for part in config.modalities:
        found[part.name] = discrete.get(part.name) or TokenRange(
            name=part.name,
            start=part.placeholder_id or 0,
            size=1,
            begin_id=part.begin_id,
            end_id=part.end_id,
            num_tokens=part.num_tokens,
            frame_size=part.frame_size,
        )
    return found


def encode_document(
    config: OmniMoeConfig, document: Sequence[tuple[str, Any]], tokenizers: Mapping[str, Tokenizer]
) -> list[tuple[str, Tensor]]:
    """Raw inputs to local ids ``(n,)``, or to rows ``(n, C)`` where the modality is continuous.

    Raises:
        GenerationError: if an input is empty, or a text of blanks.
        TokenizerError: if it is not of its modality.
    """
    spans = []
    for name, raw in document:
        tokenizer = tokenizers[name]
        encode = tokenizer.encode if name in config.token_ranges else tokenizer.encode_rows
        held = encode(*raw) if isinstance(raw, tuple) else encode(raw)
        if not len(held) or (isinstance(raw, str) and not raw.strip()):
            raise GenerationError(f"the {name} input {str(raw)[:40]!r} is empty; leave it out to generate without it")
        spans.append((name, held))
    return spans


def lay_out_prompt(
    config: OmniMoeConfig,
    spans: Sequence[tuple[str, Tensor]],
    *,
    opened: str | None = None,
    is_closed: bool = False,
) -> Prompt:
    """Spans to a prompt: begin of document, the spans, and the begin token of what is wanted.

    Args:
        config: the model's.
        spans: of :func:`encode_document`.
        opened: the modality wanted next, if it is known.
        is_closed: put the end of the document behind it.

    Raises:
        GenerationError: if nothing is left to start from, or it is longer than the model was made for.
    """
    features: dict[str, Tensor] = {}
    local: list[tuple[str, np.ndarray]] = []
    for name, held in spans:
        if held.is_floating_point():
            features[name] = torch.cat((features[name], held)) if name in features else held
            local.append((name, np.zeros(len(held), np.int64)))
        else:
            local.append((name, held.numpy()))
    eos = config.eos_token_id
    end = (eos if isinstance(eos, int) or eos is None else eos[0]) if is_closed else None
    piece = lay_out(local, layout_ranges(config), bos_id=config.bos_token_id, eos_id=end, opened=opened)
    if not len(piece):
        raise GenerationError("nothing to start from: the model has no bos_token_id; pass an input")
    if len(piece) > config.max_position_embeddings:
        raise GenerationError(
            f"the prompt has {len(piece)} tokens, and the model was made for {config.max_position_embeddings}; "
            "shorten the input"
        )
    return Prompt(ids=torch.from_numpy(piece.ids), features=features)


def pad_prompts(config: OmniMoeConfig, prompts: Sequence[Prompt], *, side: str = "left") -> dict[str, Any]:
    """A batch: ``input_ids`` and ``attention_mask`` ``(B, T)``, and ``features`` where there are any.

    Args:
        config: the model's.
        prompts: the rows.
        side: where padding goes.
    """
    length = max(len(prompt.ids) for prompt in prompts)
    ids = torch.full((len(prompts), length), padding_id(config))
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        place = slice(length - len(prompt.ids), None) if side == "left" else slice(0, len(prompt.ids))
        ids[row, place] = prompt.ids
        mask[row, place] = 1
    names = [name for name in config.modality_names if any(name in prompt.features for prompt in prompts)]
    features = {
        name: torch.cat([prompt.features[name] for prompt in prompts if name in prompt.features]) for name in names
    }
    return {"input_ids": ids, "attention_mask": mask, **({"features": features} if features else {})}


def padding_id(config: OmniMoeConfig) -> int:
    """What stands at padding: the model's, or any id."""
    return next(iter([*token_ids(config.pad_token_id), *token_ids(config.eos_token_id), 0]))


def token_ids(token: int | Sequence[int] | None) -> list[int]:
    """None, one id or several as a list."""
    return [] if token is None else [token] if isinstance(token, int) else list(token)

"""From words, pictures and clips to words, by an ERNIE-4.5-VL checkpoint as it is published.

A document is what is asked: words, pictures and clips in any order. It is laid out as one turn of a talk, as the
published template has it: what is said by the user, each picture under its number, then the answer.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from itertools import groupby
from os import PathLike
from pathlib import Path
from typing import Any, Unpack

import numpy as np
import torch
from torch import Tensor

from omnimoe.encoders.rotary_vit import RotaryViT
from omnimoe.generation.prompts import token_ids
from omnimoe.model import OmniMoeForCausalLM
from omnimoe.pipelines.base import Loading, Part, Pipeline, open_published, read_documents, register_pipeline
from omnimoe.tokenizers import TokenizerError
from omnimoe.tokenizers.hf_text import HfTextTokenizer

BEGIN, USER, ANSWER = "<|begin_of_sentence|>", "User: ", "\nAssistant: "
PICTURE, CLIP = "Picture {}:", "Video {}:"
THINK, THOUGHT = "<think>", "</think>"
"""Words of the published template."""


@register_pipeline("ernie4_5_vl")
class Ernie45VL(Pipeline):
    """A model with its tokenizer; the vision tower is a part of the model.

    Args:
        model: of the family.
        tokenizer: of its words.
    """

    targets = ("text",)

    def __init__(self, model: OmniMoeForCausalLM, tokenizer: HfTextTokenizer) -> None:
        self.model = model.eval()
        self.tokenizer = tokenizer
        self.vision: Any = model.model.modalities["vision"]
        self.tower: RotaryViT = self.vision.get_encoder()

    @classmethod
    def from_pretrained(cls, source: str | PathLike[str], **options: Unpack[Loading]) -> Ernie45VL:
        """A published checkpoint: a folder, an id on the Hub, or a name of the zoo.

        Args:
            source: as for :func:`omnimoe.from_pretrained`, or a name of the zoo.
            options: those of :class:`~omnimoe.pipelines.base.Loading`; the routers stay in float32.

        Raises:
            CheckpointError: if a file is missing, malformed, or does not fit.
            TokenizerError: if there is no tokenizer.
        """
        folder, load = open_published(source, ("*.json", "tokenizer.model*"), **options)
        tokenizer = read_tokenizer(folder)
        return cls(load(), tokenizer)

    @torch.no_grad()
    def answer(
        self,
        documents: Sequence[Sequence[Part] | str],
        *,
        max_new_tokens: int = 512,
        thinking: bool = False,
        is_turn: bool = True,
        **options: Any,
    ) -> list[str]:
        """Words for each document; they are worked on together, whatever pictures they hold.

        Args:
            documents: words, or words, pictures and clips in order. A clip is a list of pictures, its frames, or a
                uint8 array ``(T, H, W, 3)``.
            max_new_tokens: longest answer.
            thinking: let the model write down its thoughts first; they are a part of the answer then.
            is_turn: lay the document out as a turn of a talk; False lets the model complete it, as base models do.
            options: of ``model.generate``: ``do_sample``, ``temperature``, ``num_beams``, ...

        Returns:
            A text for each.

        Raises:
            ValueError: if a document is empty or too long.
            EncoderError: if a part is neither words nor a picture nor a clip.
        """
        config, given = self.model.config, read_documents(documents, lambda part: part)
        laid = [self._laid(parts, thinking=thinking, is_turn=is_turn) for parts in given]
        length = max(len(ids) for ids, _ in laid)
        if length + 1 > config.max_position_embeddings:
            raise ValueError(
                f"a document has {length} tokens, more than the {config.max_position_embeddings} that the model was "
                "made for; shorten it, or give smaller pictures"
            )
        pad = self._ends[0] if config.pad_token_id is None else config.pad_token_id
        rows = [torch.cat((torch.full((length - len(ids),), pad), ids)) for ids, _ in laid]
        mask = [torch.arange(length) >= length - len(ids) for ids, _ in laid]
        seen = [part for _, inputs in laid for part in inputs]
        features: dict[str, Any] = {}
        if seen:
            patches = torch.cat([held for held, _ in seen])
            features["vision"] = self.tower.pad(patches, torch.tensor([grid for _, grid in seen]))
        found = self.model.generate(
            torch.stack(rows).to(self.model.device),
            attention_mask=torch.stack(mask).long().to(self.model.device),
            features=features,
            max_new_tokens=min(max_new_tokens, config.max_position_embeddings - length),
            eos_token_id=self._ends,
            pad_token_id=pad,
            suppress_tokens=self._silent or None,
            **options,
        )
        said = []
        for row in found[:, length:].cpu():
            at = torch.isin(row, torch.tensor(self._ends)).nonzero()
            said.append(self.tokenizer.decode(row[: int(at[0])] if len(at) else row))
        return said

    def _laid(
        self, parts: list[Any], *, thinking: bool, is_turn: bool
    ) -> tuple[Tensor, list[tuple[Tensor, tuple[int, int, int]]]]:
        """The ids of a document ``(T,)``, and the patches of its pictures and clips with their grids."""
        pieces: list[str | list[int]] = [self._marker(BEGIN) or token_ids(self.model.config.bos_token_id)[:1]]
        pieces.append(USER if is_turn else "")
        counts, seen = {False: 0, True: 0}, []
        for part in parts:
            if isinstance(part, str):
                pieces.append(part)
                continue
            is_clip = isinstance(part, list | tuple) or (isinstance(part, np.ndarray | Tensor) and part.ndim == 4)
            prepared = self.tower.prepare([part])
            (span,) = self.vision.span_ids(prepared)
            seen.append((prepared["patches"][0], tuple(prepared["grids"][0].tolist())))
            counts[is_clip] += 1
            pieces.append((CLIP if is_clip else PICTURE).format(counts[is_clip]) if is_turn else "")
            pieces.append(span.tolist())
        if is_turn:
            pieces.append(ANSWER)
            think, thought = self._marker(THINK) or THINK, self._marker(THOUGHT) or THOUGHT
            pieces += [think] if thinking else [think, "\n\n", thought, "\n\n"]
        return self._encoded(pieces), seen

    def _encoded(self, pieces: list[str | list[int]]) -> Tensor:
        """Pieces to ids; words that stand side by side are read as one text."""
        parts: list[Tensor] = []
        for is_text, held in groupby(pieces, key=lambda piece: isinstance(piece, str)):
            if not is_text:
                parts.append(torch.tensor([token for piece in held for token in piece], dtype=torch.int64))
            elif text := "".join(str(piece) for piece in held):
                parts.append(self.tokenizer.encode(text))
        return torch.cat(parts)

    def _marker(self, word: str) -> list[int]:
        """The id of a marker; nothing where the tokenizer has no such word."""
        found = self._words.get(word)
        return [] if found is None else [found]

    @cached_property
    def _words(self) -> dict[str, int]:
        return self.tokenizer.model.get_vocab()

    @cached_property
    def _ends(self) -> list[int]:
        """What ends an answer."""
        given = self.model.generation_config.eos_token_id
        return token_ids(self.model.config.eos_token_id if given is None else given)

    @cached_property
    def _silent(self) -> list[int]:
        """Rows without a word, for the table is longer than the tokenizer's list."""
        known = {*self._words.values(), *self._ends}
        return [token for token in range(self.model.config.vocab_size) if token not in known]


register_pipeline("ernie4_5_vl_flat")(Ernie45VL)


def read_tokenizer(folder: Path) -> HfTextTokenizer:
    """The tokenizer of a checkpoint: ``tokenizer.json``, or SentencePiece's ``tokenizer.model`` as first published.

    Raises:
        TokenizerError: if there is none, or it cannot be read.
    """
    if (folder / "tokenizer.json").is_file():
        return HfTextTokenizer.from_pretrained(folder / "tokenizer.json", add_markers=False)
    if not (folder / "tokenizer.model").is_file():
        raise TokenizerError(f"{folder} has neither tokenizer.json nor tokenizer.model; fetch the checkpoint again")
    from transformers import LlamaTokenizer

    try:
        model = LlamaTokenizer.from_pretrained(str(folder), add_bos_token=False, add_prefix_space=False)
    except Exception as error:  # whatever a wrong file makes the library raise
        raise TokenizerError(f"{folder} cannot be read as a tokenizer: {error}") from error
    return HfTextTokenizer(HfTextTokenizer.Config(add_markers=False), model=model)


__all__ = ["Ernie45VL", "read_tokenizer"]

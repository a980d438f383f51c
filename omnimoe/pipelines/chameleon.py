"""From words and pictures to words and pictures, by a Chameleon checkpoint as it is published.

A document is what is said: words and pictures in any order. It is laid out as one turn of a talk, and the model answers
in words, draws a picture, or goes on in both. A picture is a span of codes between two tokens; the partition of the
vocabulary holds generation to that.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from os import PathLike
from pathlib import Path
from typing import Any, Unpack

import numpy as np
import torch
from torch import Tensor

from omnimoe.generation.media import Generated
from omnimoe.generation.prompts import Prompt, lay_out_prompt, pad_prompts, token_ids
from omnimoe.generation.sampling import ByModality, Sampling, row_generators, sample
from omnimoe.inputs import check_whole
from omnimoe.model import OmniMoeForCausalLM
from omnimoe.pipelines.base import (
    Loading,
    Part,
    Pipeline,
    document_seeds,
    open_published,
    read_documents,
    register_pipeline,
)
from omnimoe.spans import read_spans
from omnimoe.tokenizers import Tokenizer
from omnimoe.tokenizers.hf_text import HfTextTokenizer
from omnimoe.tokenizers.raster import to_picture
from omnimoe.zoo.chameleon.convert import TURN
from omnimoe.zoo.chameleon.decoder import FILE, add_decoder

TEMPERATURE, TOP_P = 0.7, 0.9
"""How codes of pictures are sampled, as published."""
GUIDANCE = (3.0, 1.2)
"""How far a picture is moved from what is drawn without the words of the document, and that from what is drawn of
nothing, as published."""


@register_pipeline("chameleon")
class Chameleon(Pipeline):
    """A model with its tokenizer; the autoencoder of its pictures is a part of the model.

    Args:
        model: of the family.
        tokenizer: of its words.
    """

    targets = ("text", "image")

    def __init__(self, model: OmniMoeForCausalLM, tokenizer: HfTextTokenizer) -> None:
        self.model = model.eval()
        self.tokenizer = tokenizer
        self.pictures = model.model.modalities["image"].tokenizer

    @classmethod
    def from_pretrained(
        cls,
        source: str | PathLike[str],
        *,
        decoder: str | PathLike[str] | None = None,
        **options: Unpack[Loading],
    ) -> Chameleon:
        """A published checkpoint: a folder, an id on the Hub, or a name of the zoo.

        Args:
            source: as for :func:`omnimoe.from_pretrained`, or a name of the zoo.
            decoder: a safetensors file with the decoder of the codes, for a checkpoint that was published without;
                ``vqgan.safetensors`` beside the checkpoint, if there is one, where None.
            options: those of :class:`~omnimoe.pipelines.base.Loading`.

        Raises:
            CheckpointError: if a file is missing, malformed, or does not fit.
            TokenizerError: if there is no tokenizer.
        """
        # a pattern, since most have no such file, and one that is named in full must be there
        folder, load = open_published(source, ("*.json", f"{FILE}*"), **options)
        tokenizer = HfTextTokenizer.from_pretrained(folder / "tokenizer.json", add_markers=False)
        model = load()
        beside = folder / FILE
        if decoder is not None or beside.is_file():
            add_decoder(model, beside if decoder is None else Path(decoder))
        return cls(model, tokenizer)

    @property
    def tokenizers(self) -> dict[str, Tokenizer]:
        """What ``omnimoe.generate`` and the like take as ``tokenizers``."""
        return {"text": self.tokenizer, "image": self.pictures}

    @torch.no_grad()
    def answer(
        self,
        documents: Sequence[Sequence[Part] | str],
        *,
        max_new_tokens: int = 512,
        is_turn: bool = True,
        **options: Any,
    ) -> list[str]:
        """Words for each document.

        Args:
            documents: words, or words and pictures in order.
            max_new_tokens: longest answer.
            is_turn: end the document as somebody's turn; False lets the model complete it.
            options: of ``model.generate``: ``do_sample``, ``temperature``, ``num_beams``, ...

        Returns:
            A text for each.

        Raises:
            ValueError: if a document is empty or too long.
        """
        config = self.model.config
        batch = pad_prompts(config, self._prompts(documents, is_turn=is_turn, room=1))
        batch = {name: held.to(self.model.device) for name, held in batch.items()}
        start = batch["input_ids"].shape[1]
        found = self.model.generate(
            **batch,
            max_new_tokens=min(max_new_tokens, config.max_position_embeddings - start),
            spans=(),
            suppress_tokens=self._silent or None,
            eos_token_id=config.eos_token_id,
            pad_token_id=config.eos_token_id,
            **options,
        )
        ends = token_ids(config.eos_token_id)
        said = []
        for row in found[:, start:].cpu():
            at = torch.isin(row, torch.tensor(ends)).nonzero()
            said.append(self.tokenizer.decode(row[: int(at[0])] if len(at) else row))
        return said

    def draw(
        self,
        documents: Sequence[Sequence[Part] | str],
        *,
        sizes: Sequence[tuple[int, int]] | tuple[int, int] | None = None,
        guidance: float | tuple[float, float] | None = None,
        steps: int | None = None,
        seed: int | None = None,
        temperature: ByModality = TEMPERATURE,
        top_k: ByModality | None = None,
        top_p: ByModality | None = TOP_P,
        min_p: ByModality | None = None,
        is_turn: bool = True,
    ) -> list[np.ndarray]:
        """A picture for each document.

        Args:
            documents: words, or words and pictures in order.
            sizes: None, or the one height and width that the model draws.
            guidance: how far to move from what is drawn without the words; or that and how far to move what is drawn
                without words from what is drawn of nothing. :data:`GUIDANCE` where None; 1 is none.
            steps: must be None: a picture is drawn code by code.
            seed: document i has the randomness of ``seed + i``, whatever it is drawn with.
            temperature: of sampling; 0 takes the most likely code.
            top_k: sample among so many codes.
            top_p: sample among the most likely codes that hold this share.
            min_p: sample among codes at least this share as likely as the likeliest.
            is_turn: as in :meth:`answer`.

        Returns:
            ``(S, S, 3)`` uint8 for each.

        Raises:
            ValueError: if there is no decoder, a size or the steps do not fit, or a document is empty or too long.
        """
        side = self.pictures.image_size
        if steps is not None:
            raise ValueError(f"Chameleon draws code by code and has no steps of denoising, got steps={steps}")
        if sizes is not None and not (np.asarray(sizes) == side).all():
            raise ValueError(f"Chameleon draws pictures of {side} x {side} pixels and no others, got {sizes}")
        self._check_decoder()
        held = self.model.config.token_ranges["image"]
        prompts = self._prompts(documents, is_turn=is_turn, opened="image", room=self.pictures.num_tokens)
        sampling = self._sampling(guidance, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
        made = self._sample(
            prompts, sampling, seed, stops=token_ids(held.end_id), longest=self.pictures.num_tokens, spans=("image",)
        )
        return [self.pictures.decode(ids - held.start) for ids, _ in made]

    def interleave(
        self,
        documents: Sequence[Sequence[Part] | str],
        *,
        max_new_tokens: int | None = None,
        guidance: float | tuple[float, float] | None = None,
        seed: int | None = None,
        temperature: ByModality = TEMPERATURE,
        top_k: ByModality | None = None,
        top_p: ByModality | None = TOP_P,
        min_p: ByModality | None = None,
        is_turn: bool = True,
    ) -> list[list[Generated]]:
        """Words and pictures for each document, as the model chooses, until it ends.

        Args:
            documents: words, or words and pictures in order.
            max_new_tokens: longest continuation, codes of pictures included; what the model has room for where None.
            guidance: of pictures, as in :meth:`draw`.
            seed: see there, and so are the other arguments.
            temperature: of sampling, words and codes alike.
            top_k: see there.
            top_p: see there.
            min_p: see there.
            is_turn: see there.

        Returns:
            The spans of each continuation in order, ``raw`` being words or a picture. A picture that the limit cut
            short is left out.

        Raises:
            ValueError: if there is no decoder, a choice is out of range, or a document is empty or too long.
        """
        if max_new_tokens is not None:
            check_whole("max_new_tokens", max_new_tokens)
        self._check_decoder()
        config = self.model.config
        prompts = self._prompts(documents, is_turn=is_turn, room=1)
        room = config.max_position_embeddings - max(len(prompt.ids) for prompt in prompts)
        sampling = self._sampling(guidance, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
        stops = token_ids(config.eos_token_id)
        made = self._sample(prompts, sampling, seed, stops=stops, longest=min(max_new_tokens or room, room), spans=None)
        return [
            [
                Generated(modality=span.modality, ids=span.ids, raw=self.tokenizers[span.modality].decode(span.ids))
                for span in read_spans(ids, config)
                if span.is_whole
            ]
            for ids, _ in made
        ]

    def _sample(
        self,
        prompts: list[Prompt],
        sampling: Sampling,
        seed: int | None,
        *,
        stops: list[int],
        longest: int,
        spans: Sequence[str] | None,
    ) -> list[tuple[Tensor, int | None]]:
        count = len(prompts)
        seeds = [int(torch.randint(2**62, ())) if own is None else own for own in document_seeds(seed, count)]
        return sample(
            self.model,
            prompts,
            row_generators(prompts, seeds, 1),
            sampling,
            stops=stops,
            longest=longest,
            spans=spans,
            guided=("image",),
            silent=self._silent,
        )

    def _sampling(self, guidance: Any, **choices: Any) -> Sampling:
        if isinstance(guidance, Mapping):
            guidance = guidance.get("image")
        if guidance is None or isinstance(guidance, int | float):
            guidance = GUIDANCE if guidance is None else (1.0, 1.0) if guidance == 1 else (guidance, GUIDANCE[1])
        sampling = Sampling(guidance={"image": guidance}, **choices)
        sampling.check(self.model.config)
        return sampling

    def _check_decoder(self) -> None:
        if not self.model.config.modalities[1].autoencoder.has_decoder:
            raise ValueError(
                "this checkpoint was published without the decoder of its pictures, so it draws none; pass "
                f"decoder=FILE, or put {FILE} beside it (docs/chameleon.md says where to get it)"
            )

    def _prompts(self, given: Any, *, is_turn: bool, room: int, opened: str | None = None) -> list[Prompt]:
        """Documents as prompts with so much room behind them."""
        config = self.model.config
        turn = self.tokenizer.model.get_vocab().get(TURN) if is_turn else None
        prompts = []
        for place, document in enumerate(read_documents(given, to_picture)):
            spans = [
                ("text", self.tokenizer.encode(part))
                if isinstance(part, str)
                else ("image", self.pictures.encode(part))
                for part in document
            ]
            spans += [] if turn is None else [("text", torch.tensor([turn]))]
            prompt = lay_out_prompt(config, spans, opened=opened)
            if len(prompt.ids) + room > config.max_position_embeddings:
                raise ValueError(
                    f"document {place} has {len(prompt.ids)} tokens, and with {room} more it passes the "
                    f"{config.max_position_embeddings} that the model was made for; shorten it, a picture has "
                    f"{self.pictures.num_tokens}"
                )
            prompts.append(prompt)
        return prompts

    @cached_property
    def _silent(self) -> list[int]:
        """Rows that are never written: special words, and rows without a word."""
        config, words = self.model.config, self.tokenizer.model.get_vocab()
        plain = {row for word, row in words.items() if not word.startswith("<") or word == "<"}
        held = config.token_ranges["image"]
        used = {*token_ids(config.eos_token_id), held.begin_id, held.end_id, *range(held.start, held.stop)}
        return [row for row in range(config.vocab_size) if row not in plain and row not in used]


__all__ = ["GUIDANCE", "TEMPERATURE", "TOP_P", "Chameleon"]

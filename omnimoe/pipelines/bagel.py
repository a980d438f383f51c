"""From words and pictures to words and pictures, by a BAGEL checkpoint as it is published.

A document is what is asked: words and pictures in any order. To draw, a picture in it goes in twice, as latents and
then as seen, as published; to answer it is seen alone. Documents of one call are worked on together.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any, Unpack

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from omnimoe.denoise import denoise
from omnimoe.encoders.raw import whole_pictures
from omnimoe.encoders.siglip import fit_size
from omnimoe.guidance import Guidance
from omnimoe.inputs import check_whole
from omnimoe.model import OmniMoeForCausalLM
from omnimoe.pipelines.base import (
    Loading,
    Part,
    Pipeline,
    noise_of,
    open_published,
    read_documents,
    register_pipeline,
)
from omnimoe.tokenizers import Tokenizer, TokenizerError
from omnimoe.tokenizers.hf_text import HfTextTokenizer
from omnimoe.zoo.bagel.autoencoder import FILE, PIXELS, BagelAutoencoder
from omnimoe.zoo.bagel.convert import BEGIN, BOS, DRAWN, END, EOS, LATENT_CHANNELS, LATENT_PATCH, SEEN, VISION_TOWER

DRAWING = Guidance(scales=((("text",), 4.0),), interval=(0.4, 1.0), renorm="global")
"""For pictures from words, as in the notebook of the published code: away from what is drawn without them."""
EDITING = Guidance(scales=((("text",), 4.0), (("vision", "image"), 2.0)), interval=(0.0, 1.0), renorm="first_channel")
"""For documents with pictures, as there: away from what is drawn without the words, then without the pictures."""
STEPS, SHIFT = 49, 3.0
"""Forwards of a picture and the shift of their times, as published."""
SHORTEST, LONGEST = 512, 1024
"""Sides in pixels that pictures are brought to before they are cut into latents."""


@dataclass(frozen=True, kw_only=True)
class _Batch:
    """Documents as columns, padded in front, and the features that stand in them."""

    input_ids: Tensor
    attention_mask: Tensor
    features: dict[str, Any]


@register_pipeline("bagel")
class Bagel(Pipeline):
    """A model with its tokenizer and its picture autoencoder.

    Args:
        model: of the family.
        tokenizer: of its words.
        autoencoder: None for a copy that only answers.
    """

    targets = ("text", "image")

    def __init__(
        self, model: OmniMoeForCausalLM, tokenizer: Tokenizer, autoencoder: BagelAutoencoder | None = None
    ) -> None:
        self.model = model.eval()
        self.tokenizer = tokenizer
        self.autoencoder = autoencoder

    @classmethod
    def from_pretrained(cls, source: str | PathLike[str], **options: Unpack[Loading]) -> Bagel:
        """A published checkpoint: a folder, an id on the Hub, or a name of the zoo.

        Args:
            source: as for :func:`omnimoe.from_pretrained`, or a name of the zoo.
            options: those of :class:`~omnimoe.pipelines.base.Loading`; the autoencoder stays in float32.

        Raises:
            CheckpointError: if a file is missing, malformed, or does not fit.
        """
        folder, load = open_published(source, ("*.json", "merges.txt", FILE), **options)
        tokenizer, autoencoder = read_tokenizer(folder), BagelAutoencoder.from_folder(folder)
        model = load()
        return cls(model, tokenizer, autoencoder.to(model.device))

    def draw(
        self,
        documents: Sequence[Sequence[Part] | str],
        *,
        sizes: Sequence[tuple[int, int]] | tuple[int, int] | None = None,
        guidance: float | Guidance | None = None,
        steps: int | None = None,
        seed: int | None = None,
        shift: float = SHIFT,
    ) -> list[np.ndarray]:
        """A picture for each document: drawn from words, or a picture changed as the words say.

        Args:
            documents: words, or words and pictures in order.
            sizes: height and width in pixels, multiples of 16, one for all or one each; where None that of a document's
                last picture, or 1024 x 1024.
            guidance: how far to push away from what is drawn without the words, or all of :class:`Guidance`;
                :data:`EDITING` where None and a document holds a picture, else :data:`DRAWING`.
            steps: forwards through the model; :data:`STEPS` where None.
            seed: of the noise; document i has that of ``seed + i`` alone, whatever it is drawn with.
            shift: how much longer it stays at noisy times.

        Returns:
            ``(H, W, 3)`` uint8 for each.

        Raises:
            ValueError: if there is no autoencoder, a size does not fit, or a document is empty.
        """
        steps = STEPS if steps is None else steps
        check_whole("steps", steps)
        read = self._read(documents)
        has_pictures = any(not isinstance(part, str) for document in read for part in document)
        published = EDITING if has_pictures else DRAWING
        if guidance is None:
            guidance = published
        elif not isinstance(guidance, Guidance):
            (words, _), *rest = published.scales
            guidance = dataclasses.replace(published, scales=((words, guidance), *rest))
        if self.autoencoder is None:
            raise ValueError(f"this copy has no autoencoder to draw with; load one with {FILE}")
        shapes = [self._shape(document, size) for document, size in zip(read, _each(sizes, len(read)), strict=True)]
        noise = torch.cat(noise_of([(tall * wide, LATENT_CHANNELS * LATENT_PATCH**2) for tall, wide in shapes], seed))
        batch = self._batch(read, drawn=shapes)
        rows = denoise(
            self.model,
            "image",
            batch.input_ids,
            attention_mask=batch.attention_mask,
            features=batch.features,
            drawn=self._last_span(batch),
            sizes=shapes,
            steps=steps,
            shift=shift,
            noise=noise.to(self.model.device),
            guidance=guidance,
        )
        counts = [tall * wide for tall, wide in shapes]
        pictures = [part.view(*shape, -1) for part, shape in zip(rows.float().split(counts), shapes, strict=True)]
        return self.autoencoder.decode(pictures)

    @torch.no_grad()
    def answer(
        self, documents: Sequence[Sequence[Part] | str], *, max_new_tokens: int = 512, **options: Any
    ) -> list[str]:
        """Words for each document.

        Args:
            documents: words and pictures in order.
            max_new_tokens: longest answer.
            options: of ``model.generate``: ``do_sample``, ``temperature``, ``num_beams``, ...

        Returns:
            A text for each.
        """
        read = self._read(documents)
        batch = self._batch(read, is_answered=True)
        # the table is longer than the tokenizer's list, and a row without a text cannot be told
        silent = [token for token in range(self.tokenizer.vocab_size, self.model.config.vocab_size) if token != EOS]
        found = self.model.generate(
            batch.input_ids,
            attention_mask=batch.attention_mask,
            features=batch.features,
            max_new_tokens=max_new_tokens,
            eos_token_id=EOS,
            pad_token_id=EOS,
            free=True,
            suppress_tokens=silent or None,
            **options,
        )
        said = []
        for row in found[:, batch.input_ids.shape[1] :].tolist():
            said.append(self.tokenizer.decode(torch.tensor(row[: row.index(EOS)] if EOS in row else row)))
        return said

    def _read(self, documents: Sequence[Sequence[Part] | str]) -> list[list[str | Image.Image]]:
        """Documents as lists of parts, where the model can see what they hold."""
        read = _documents(documents)
        is_blind = VISION_TOWER in self.model.config.published.get("absent", ())
        if is_blind and any(not isinstance(part, str) for document in read for part in document):
            raise ValueError(
                f"this copy has no {VISION_TOWER} to see a picture with; give it words alone, or load a whole copy"
            )
        return read

    def _shape(self, document: list[str | Image.Image], size: tuple[int, int] | None) -> tuple[int, int]:
        if size is None:
            pictures = [part for part in document if not isinstance(part, str)]
            size = (pictures[-1].height, pictures[-1].width) if pictures else (LONGEST, LONGEST)
        if min(size) < PIXELS or size[0] % PIXELS or size[1] % PIXELS or max(size) > LONGEST:
            raise ValueError(f"a size must be multiples of {PIXELS} up to {LONGEST} pixels, got {size}")
        return size[0] // PIXELS, size[1] // PIXELS

    def _batch(
        self,
        documents: list[list[str | Image.Image]],
        *,
        drawn: Sequence[tuple[int, int]] = (),
        is_answered: bool = False,
    ) -> _Batch:
        vision = self.model.model.modalities["vision"].get_encoder()
        rows, seen, latents = [], [], []
        for place, document in enumerate(documents):
            ids: list[int] = []
            for part in document:
                if isinstance(part, str):
                    ids += [BOS, *self.tokenizer.encode(part).tolist(), EOS]
                    continue
                if not is_answered and self.autoencoder is not None:
                    (cells,) = self.autoencoder.encode([np.asarray(part)])
                    latents.append(cells.to(self.model.device))
                    ids += [BEGIN, *[DRAWN] * (cells.shape[0] * cells.shape[1]), END]
                patches = vision.patches(part)
                seen.append(patches)
                ids += [BEGIN, *[SEEN] * (patches.shape[0] * patches.shape[1]), END]
            if drawn:
                ids += [BEGIN, *[DRAWN] * (drawn[place][0] * drawn[place][1]), END]
            rows.append([*ids, BOS] if is_answered else ids)
        length = max(map(len, rows))
        features: dict[str, Any] = {}
        if seen:
            features["vision"] = vision.pad(seen)
        if latents:
            features["image"] = latents
        padded = [[EOS] * (length - len(row)) + row for row in rows]
        mask = [[0] * (length - len(row)) + [1] * len(row) for row in rows]
        device = self.model.device
        return _Batch(
            input_ids=torch.tensor(padded, device=device),
            attention_mask=torch.tensor(mask, device=device),
            features=features,
        )

    def _last_span(self, batch: _Batch) -> Tensor:
        """``(B, T)`` bool, the picture at the end of each document."""
        mine = batch.input_ids == DRAWN
        starts = mine & ~torch.nn.functional.pad(mine[:, :-1], (1, 0))
        order = starts.cumsum(1)
        return mine & (order == order.amax(dim=1, keepdim=True))


def _documents(given: Any) -> list[list[str | Image.Image]]:
    """Documents with their pictures opened and brought to a size that the autoencoder takes."""
    return read_documents(given, _fitted)


def _fitted(picture: Any) -> Image.Image:
    (whole,) = whole_pictures([picture])
    size = fit_size(*whole.size, patch_size=PIXELS, shortest=SHORTEST, longest=LONGEST)
    return whole.resize(size, Image.Resampling.BICUBIC)


def read_tokenizer(folder: Path) -> HfTextTokenizer:
    """Qwen2's tokenizer of a checkpoint, whose own ``config.json`` may be none.

    Raises:
        TokenizerError: if the files are missing or damaged.
    """
    if (folder / "tokenizer.json").is_file():
        return HfTextTokenizer.from_pretrained(folder / "tokenizer.json", add_markers=False)
    from transformers import Qwen2Tokenizer

    if missing := [name for name in ("vocab.json", "merges.txt") if not (folder / name).is_file()]:
        raise TokenizerError(
            f"{folder} has no {' and no '.join(missing)}, without which no words can be read; put the published files "
            "beside the weights, or tokenizer.json"
        )
    try:
        model = Qwen2Tokenizer(vocab=str(folder / "vocab.json"), merges=str(folder / "merges.txt"))
    except Exception as error:  # whatever a wrong file makes the library raise
        raise TokenizerError(f"{folder} has no tokenizer of Qwen2: {error}") from error
    return HfTextTokenizer(HfTextTokenizer.Config(add_markers=False), model=model)


def _each(sizes: Any, count: int) -> list[tuple[int, int] | None]:
    if sizes is None:
        return [None] * count
    found = np.asarray(sizes)
    if found.dtype.kind not in "iu" or found.shape not in ((2,), (count, 2)):
        raise ValueError(
            f"sizes must be (height, width) for all or one for each of {count} documents, got {str(sizes)[:60]}"
        )
    pairs = found.tolist()
    return [(pairs[0], pairs[1])] * count if found.ndim == 1 else [(tall, wide) for tall, wide in pairs]


__all__ = ["DRAWING", "EDITING", "SHIFT", "STEPS", "Bagel"]

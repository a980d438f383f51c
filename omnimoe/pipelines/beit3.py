"""Words under a mask, captions, and how well pictures and texts go together, by a BEiT-3 checkpoint.

A caption is written as BEiT-3 was tuned for it: a mask stands behind what was said, the word under it is taken, and the
next mask follows. The picture sees itself, a word sees the picture and the words before it.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Sequence
from functools import cached_property
from os import PathLike
from pathlib import Path
from typing import Any, Unpack

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from omnimoe.encoders.patch_stem import PatchStem
from omnimoe.model import OmniMoeForCausalLM
from omnimoe.pipelines.base import Loading, Part, Pipeline, open_published, read_documents, register_pipeline
from omnimoe.tokenizers import TokenizerError
from omnimoe.tokenizers.hf_text import HfTextTokenizer

MASK = "<mask>"
"""What stands in a text for a word to be found."""
SPM = "beit3.spm"
"""The published words."""


@register_pipeline("beit3")
class Beit3(Pipeline):
    """A model with its tokenizer; the map of patches is a part of the model.

    Args:
        model: of the family.
        tokenizer: of its words, one of which is the mask.

    Raises:
        TokenizerError: if none is.
    """

    targets = ("text",)

    def __init__(self, model: OmniMoeForCausalLM, tokenizer: HfTextTokenizer) -> None:
        self.model = model.eval()
        self.tokenizer = tokenizer
        vision: Any = model.model.modalities["vision"]
        self.stem: PatchStem = vision.get_encoder()
        known = tokenizer.model.get_vocab()
        if MASK not in known:
            raise TokenizerError(f"the tokenizer has no word {MASK}; take that of BEiT-3")
        self.mask_id = tokenizer.offset + known[MASK]

    @classmethod
    def from_pretrained(
        cls,
        source: str | PathLike[str],
        *,
        tokenizer: str | PathLike[str] | None = None,
        **options: Unpack[Loading],
    ) -> Beit3:
        """A checkpoint with ``beit3.spm``, its SentencePiece model, or a ``tokenizer.json`` beside it.

        Args:
            source: as for :func:`omnimoe.from_pretrained`, or a name of the zoo.
            tokenizer: a file, or the folder of one, where the tokenizer lies elsewhere.
            options: those of :class:`~omnimoe.pipelines.base.Loading`.

        Raises:
            CheckpointError: if a file is missing, malformed, or does not fit.
            TokenizerError: if there is no tokenizer.
        """
        folder, load = open_published(source, ("*.json", f"{SPM}*"), **options)
        words = read_words(folder if tokenizer is None else Path(tokenizer))
        return cls(load(), words)

    @torch.no_grad()
    def fill(self, documents: Sequence[Sequence[Part] | str]) -> list[list[str]]:
        """The likeliest word under each mask.

        Args:
            documents: words with ``<mask>`` among them, or a picture and such words.

        Returns:
            For each document a text for each mask.

        Raises:
            ValueError: if a document has no mask, or the model no head over words.
        """
        self._needs_words()
        pictures, texts = self._read(documents)
        without = next((place for place, text in enumerate(texts) if MASK not in text), None)
        if without is not None:
            raise ValueError(f"document {without} has no {MASK}, so there is no word to find; write one")
        batch = self._batch(pictures, texts)
        best = self.model(**batch).logits.argmax(-1)
        masked = batch["input_ids"] == self.mask_id
        return [[self._said(word[None]) for word in row[held]] for row, held in zip(best, masked, strict=True)]

    @torch.no_grad()
    def compare(self, pictures: Sequence[Any], texts: Sequence[str]) -> Tensor:
        """Cosines between pictures and texts.

        Args:
            pictures: P of them, of any kind.
            texts: Q of them.

        Returns:
            ``(P, Q)`` float32 in [-1, 1].

        Raises:
            InputError: if the model has no maps that align them.
        """
        seen = self.model.align("vision", self.stem.prepare(pictures))
        batch = self._batch([None] * len(texts), list(texts))
        read = self.model.align("text", batch["input_ids"], attention_mask=batch["attention_mask"])
        return seen.float() @ read.float().t()

    @torch.no_grad()
    def answer(
        self,
        documents: Sequence[Sequence[Part] | str],
        *,
        max_new_tokens: int = 32,
        do_sample: bool = False,
        **options: Any,
    ) -> list[str]:
        """A caption for each picture, the likeliest word at every step.

        Args:
            documents: of one picture each; words beside it begin the caption.
            max_new_tokens: longest caption.
            do_sample: must be False.
            options: none.

        Raises:
            ValueError: if a document has no picture, captions begin with words of unequal number, or the model has no
                head over words.
        """
        self._needs_words()
        if options or do_sample:
            refused = next(iter(options), "do_sample")
            raise ValueError(f"captions take no option {refused!r}; the likeliest word is taken")
        pictures, texts = self._read(documents)
        blind = next((place for place, picture in enumerate(pictures) if picture is None), None)
        if blind is not None:
            raise ValueError(f"document {blind} has no picture; a caption is of one")
        begun = [[self._bos, *self.tokenizer.encode(text).tolist()] if text else [self._bos] for text in texts]
        if len({len(ids) for ids in begun}) > 1:
            raise ValueError("captions begin with words of unequal number; pass them one at a time")
        model, config, said = self._writer, self.model.config, torch.tensor(begun, device=self.model.device)
        room = config.learned_positions[0] - config.position_offset - said.shape[1] - 1
        vision = torch.full(
            (len(said), self.stem.config.num_rows), config.modalities[1].placeholder_id, device=said.device
        )
        mask = torch.full_like(said[:, :1], self.mask_id)
        new, features = torch.cat((vision, said, mask), dim=1), {"vision": self.stem.prepare(pictures)}
        given: dict[str, Any] = {"features": features}
        cache, ended = None, torch.zeros(len(said), dtype=torch.bool, device=said.device)
        for _ in range(min(max_new_tokens, room)):
            out = model(new, past_key_values=cache, use_cache=True, logits_to_keep=1, **given)
            cache = out.past_key_values
            cache.crop(-1)  # the mask is no word
            word = out.logits[:, -1].argmax(-1).masked_fill(ended, self._eos)
            ended |= word == self._eos
            if bool(ended.all()):
                break
            said = torch.cat((said, word[:, None]), dim=1)
            new = torch.cat((word[:, None], mask), dim=1)
            places = torch.tensor([[said.shape[1] - 1, said.shape[1]]], device=said.device)
            given = {"position_ids": places.expand(len(said), -1)}
        return [self._said(row[row != self._eos][1:]) for row in said]

    @property
    def _bos(self) -> int:
        return self.model.config.bos_token_id

    @property
    def _eos(self) -> int:
        eos = self.model.config.eos_token_id
        return eos if isinstance(eos, int) else eos[0]

    @cached_property
    def _writer(self) -> OmniMoeForCausalLM:
        """The same weights under the mask of captions."""
        config = self.model.config.replace(mask="block_causal", bidirectional_modalities=("vision",))
        with torch.device("meta"):
            writer = OmniMoeForCausalLM(config)
        writer.load_state_dict(self.model.state_dict(), assign=True)
        writer.tie_weights()
        return writer.eval()

    def _needs_words(self) -> None:
        if not self.model.config.head_bias:
            raise ValueError("this checkpoint has no head over words; take one with mlm_head, such as beit3_base")

    def _said(self, ids: Tensor) -> str:
        return self.tokenizer.decode(ids.cpu()).strip()

    def _read(self, documents: Any) -> tuple[list[Any], list[str]]:
        """The picture, or None, and the words of each document."""
        pictures, texts = [], []
        for place, parts in enumerate(read_documents(documents, lambda picture: picture)):
            words = [part for part in parts if isinstance(part, str)]
            seen = [part for part in parts if not isinstance(part, str)]
            if len(words) > 1 or len(seen) > 1:
                raise ValueError(
                    f"document {place} has {len(seen)} pictures and {len(words)} texts; BEiT-3 reads one of each"
                )
            pictures.append(seen[0] if seen else None)
            texts.append(words[0] if words else "")
        return pictures, texts

    def _batch(self, pictures: list[Any], texts: list[str]) -> dict[str, Any]:
        """Pictures before texts, padded behind."""
        config, device = self.model.config, self.model.device
        sequences = []
        for picture, text in zip(pictures, texts, strict=True):
            ids = [] if picture is None else [config.modalities[1].placeholder_id] * self.stem.config.num_rows
            ids.append(self._bos)
            for place, part in enumerate(text.split(MASK)):
                ids += [self.mask_id] * (place > 0) + self.tokenizer.encode(part.strip()).tolist()
            sequences.append(torch.tensor([*ids, self._eos], device=device))
        batch: dict[str, Any] = {
            "input_ids": pad_sequence(sequences, batch_first=True, padding_value=config.pad_token_id),
            "attention_mask": pad_sequence([torch.ones_like(ids) for ids in sequences], batch_first=True),
        }
        seen = [picture for picture in pictures if picture is not None]
        return {**batch, "features": {"vision": self.stem.prepare(seen)}} if seen else batch


def read_words(place: Path) -> HfTextTokenizer:
    """BEiT-3's words: ``beit3.spm`` with the ids that fairseq gives its pieces, or a ``tokenizer.json``.

    Args:
        place: the file, or the folder that holds one of that name.

    Raises:
        TokenizerError: if there is none, or it cannot be read.
    """
    place = place.expanduser()
    if place.is_dir():
        found = [place / name for name in ("tokenizer.json", SPM) if (place / name).is_file()]
        if not found:
            raise TokenizerError(f"{place} has neither tokenizer.json nor {SPM}; pass tokenizer=, where one lies")
        place = found[0]
    if place.suffix != ".spm":
        return HfTextTokenizer.from_pretrained(place, add_markers=False)
    from transformers import XLMRobertaTokenizer

    with tempfile.TemporaryDirectory() as folder:
        try:
            shutil.copy(place, Path(folder) / "sentencepiece.bpe.model")  # the name by which transformers finds it
            model = XLMRobertaTokenizer.from_pretrained(folder)
        except Exception as error:  # whatever a wrong file makes the library raise
            raise TokenizerError(f"{place} cannot be read as a SentencePiece model: {error}") from error
    return HfTextTokenizer(HfTextTokenizer.Config(add_markers=False), model=model)


__all__ = ["MASK", "Beit3", "read_words"]

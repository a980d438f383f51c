"""Text as byte pairs: a byte-level BPE with a small vocabulary, so every string is encodable and comes back exactly.

The first sixteen ids are the markers of interleaved sequences. They cannot be written from text: the string ``"<bos>"``
is encoded like any other, so input never forges a boundary.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any, Self

import tokenizers
import torch
from tokenizers import decoders, models, pre_tokenizers, trainers
from torch import Tensor

from omnimoe.config import Config as ConfigBase
from omnimoe.tokenizers.base import Tokenizer, TokenizerError, register_tokenizer

SPECIAL_TOKENS: tuple[str, ...] = (
    *("<pad>", "<bos>", "<eos>", "<image>", "</image>", "<speech>", "</speech>", "<video>", "</video>"),
    *(f"<reserved_{i}>" for i in range(9, 16)),
)
PAD_ID, BOS_ID, EOS_ID, BEGIN_IMAGE_ID, END_IMAGE_ID, BEGIN_SPEECH_ID, END_SPEECH_ID = range(7)
BEGIN_VIDEO_ID, END_VIDEO_ID = 7, 8

_SHIPPED = Path(__file__).parent / "weights" / "bpe_2048.json"


@register_tokenizer("text")
class BpeTokenizer(Tokenizer):
    """Byte-level BPE.

    Args:
        config: its size.
        bpe: the trained merges, as the ``tokenizers`` library holds them.
    """

    modality = "text"

    @dataclass(frozen=True, kw_only=True)
    class Config(ConfigBase):
        vocab_size: int = 2048
        """Number of ids, the sixteen markers included."""

    def __init__(self, config: Config, *, bpe: tokenizers.Tokenizer) -> None:
        super().__init__(config)
        size = bpe.get_vocab_size()
        if size != config.vocab_size:
            raise TokenizerError(
                f"the merges have {size} ids, the config says {config.vocab_size}; they are of two tokenizers"
            )
        for i, token in enumerate(SPECIAL_TOKENS):
            # A file may be older than the name of a marker that was spare then.
            if bpe.id_to_token(i) not in (token, f"<reserved_{i}>"):
                raise TokenizerError(
                    f"id {i} must be {token}, it is {bpe.id_to_token(i)!r}; train it with BpeTokenizer.train"
                )
        # Markers are set by whoever builds a sequence, never by what a text says.
        bpe.encode_special_tokens = True
        self.bpe = bpe
        self.vocab_size = size

    def encode(self, raw: Any) -> Tensor:
        """Text to ids, without markers at the ends.

        Args:
            raw: a string; lone surrogates are refused, all else is kept as it is.

        Returns:
            ``(n,)`` int64, each from 16 on.

        Raises:
            TokenizerError: if ``raw`` is not a string of Unicode characters.
        """
        return torch.tensor(self.encode_batch([raw])[0], dtype=torch.int64)

    def encode_batch(self, raws: Iterable[Any]) -> list[list[int]]:
        """Many texts at once, on all cores: one list of ids each."""
        texts = [check_text(raw) for raw in raws]
        return [encoding.ids for encoding in self.bpe.encode_batch_fast(texts, add_special_tokens=False)]

    def decode(self, ids: Any) -> str:
        """Ids to text. Markers are left out; bytes that are no whole character become U+FFFD.

        Args:
            ids: ``(n,)`` integers.
        """
        ids = self.check_ids(ids)
        if ids.ndim != 1:
            raise TokenizerError(f"decode takes one text, (n,) ids, not {tuple(ids.shape)}; call it once a row")
        return self.bpe.decode(ids.tolist(), skip_special_tokens=True)

    @classmethod
    def train(cls, texts: Iterable[str], *, vocab_size: int = 2048) -> Self:
        """Learns merges from ``texts``.

        Args:
            texts: any number of strings.
            vocab_size: at least 272: sixteen markers and 256 bytes.

        Raises:
            TokenizerError: if ``vocab_size`` is too small, or the texts do not give that many merges.
        """
        smallest = len(SPECIAL_TOKENS) + 256
        if vocab_size < smallest:
            raise TokenizerError(f"vocab_size must be at least {smallest}, got {vocab_size}")
        bpe = tokenizers.Tokenizer(models.BPE())
        bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        bpe.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=list(SPECIAL_TOKENS),
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
            show_progress=False,
        )
        bpe.train_from_iterator(texts, trainer)
        if bpe.get_vocab_size() != vocab_size:
            raise TokenizerError(
                f"the texts give {bpe.get_vocab_size()} ids, {vocab_size} were asked for; pass more text"
            )
        return cls(cls.Config(vocab_size=vocab_size), bpe=bpe)

    @classmethod
    def from_pretrained(cls, path: str | PathLike[str] | None = None) -> Self:
        """Reads a file, the folder it lies in, or (``None``) the tokenizer that ships with the package.

        Raises:
            TokenizerError: if there is no such file or it holds something else.
        """
        file = _SHIPPED if path is None else Path(path)
        if file.is_dir():
            file = file / f"{cls.registered_name}_tokenizer.json"
        if not file.is_file():
            raise TokenizerError(
                f"no tokenizer at {file}; pass a folder or file written by save_pretrained, or None for the shipped one"
            )
        try:
            bpe = tokenizers.Tokenizer.from_file(str(file))
        except Exception as error:  # the library raises bare Exception
            raise TokenizerError(f"{file} is not a tokenizer file: {error}") from None
        return cls(cls.Config(vocab_size=bpe.get_vocab_size()), bpe=bpe)

    def save_pretrained(self, path: str | PathLike[str]) -> None:
        """Writes one JSON file that the ``tokenizers`` library reads too.

        Args:
            path: a file name that ends in ``.json``, or a folder, where the file is called ``text_tokenizer.json``.
        """
        file = Path(path)
        if file.suffix != ".json":
            file = file / f"{self.registered_name}_tokenizer.json"
        file.parent.mkdir(parents=True, exist_ok=True)
        self.bpe.save(str(file), pretty=False)


def check_text(raw: Any) -> str:
    """``raw`` itself.

    Raises:
        TokenizerError: if ``raw`` is not a string of Unicode characters.
    """
    if not isinstance(raw, str):
        raise TokenizerError(f"text must be a str, not {type(raw).__name__}; decode bytes first")
    if not raw.isascii():
        try:
            raw.encode("utf-8")
        except UnicodeEncodeError as error:
            raise TokenizerError(f"text has a lone surrogate at {error.start}; replace it before encoding") from None
    return raw

"""Text by any tokenizer of Hugging Face: a ``tokenizer.json``, a folder, or the id of a model on the Hub.

The markers of interleaved documents come first, as in :mod:`omnimoe.tokenizers.text`: a tokenizer that does not begin
with them gets them in front, its own ids moved up by sixteen. ``add_markers=False`` leaves the ids as they are, for the
vocabulary of a published model, where the model's config says which ids are boundaries.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any, Self

import tokenizers
import torch
from torch import Tensor

from omnimoe.config import Config as ConfigBase
from omnimoe.tokenizers.adapters import quiet_transformers, read_config, write_config
from omnimoe.tokenizers.base import Tokenizer, TokenizerError, register_tokenizer
from omnimoe.tokenizers.text import SPECIAL_TOKENS, check_text


@register_tokenizer("hf_text")
class HfTextTokenizer(Tokenizer):
    """Text to the ids of another tokenizer, without what it would add at the ends.

    What comes back is what that tokenizer gives back: byte-level ones return every text exactly, others may lower its
    case or lose spaces.

    Args:
        config: whether there are markers.
        model: a ``tokenizers.Tokenizer``, or a tokenizer of transformers.

    Attributes:
        offset: id of the other tokenizer's id 0.
    """

    modality = "text"

    @dataclass(frozen=True, kw_only=True)
    class Config(ConfigBase):
        add_markers: bool = True
        """Put the sixteen markers in front, unless the tokenizer begins with them already."""

    def __init__(self, config: Config, *, model: Any) -> None:
        super().__init__(config)
        self.model = model
        known = model.get_vocab()
        has_markers = all(known.get(token) == i for i, token in enumerate(SPECIAL_TOKENS))
        self.offset = len(SPECIAL_TOKENS) if config.add_markers and not has_markers else 0
        # Ids may have gaps, so the number of entries says too little.
        self.vocab_size = self.offset + max(known.values()) + 1
        if isinstance(model, tokenizers.Tokenizer):
            # Markers are set by whoever builds a sequence, never by what a text says.
            model.encode_special_tokens = True
            # A file may hold the limits of the encoder that it was made for.
            model.no_truncation()
            model.no_padding()

    def encode(self, raw: Any) -> Tensor:
        """A string to ids ``(n,)`` int64; special tokens written in it are text.

        Raises:
            TokenizerError: if ``raw`` is not a string of Unicode characters.
        """
        return torch.tensor(self.encode_batch([raw])[0], dtype=torch.int64)

    def encode_batch(self, raws: Iterable[Any]) -> list[list[int]]:
        """Many texts at once: one list of ids each."""
        texts = [check_text(raw) for raw in raws]
        if isinstance(self.model, tokenizers.Tokenizer):
            found = [encoding.ids for encoding in self.model.encode_batch(texts, add_special_tokens=False)]
        else:
            options = {"add_special_tokens": False, "split_special_tokens": True, "truncation": False, "padding": False}
            found = self.model(texts, **options)["input_ids"] if texts else []
        return [[self.offset + i for i in ids] for ids in found]

    def decode(self, ids: Any) -> str:
        """Ids ``(n,)`` to text. Markers and the other tokenizer's special tokens are left out.

        Raises:
            TokenizerError: if an id is out of range, or there is more than one axis.
        """
        ids = self.check_ids(ids)
        if ids.ndim != 1:
            raise TokenizerError(f"decode takes one text, (n,) ids, not {tuple(ids.shape)}; call it once a row")
        own = (ids[ids >= self.offset] - self.offset).tolist()
        if isinstance(self.model, tokenizers.Tokenizer):
            return self.model.decode(own, skip_special_tokens=True)
        return self.model.decode(own, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    @classmethod
    def from_pretrained(cls, path: str | PathLike[str] | None = None, **options: Any) -> Self:
        """Reads a tokenizer.

        Args:
            path: a ``tokenizer.json`` or another file of the ``tokenizers`` library; a folder of transformers or of
                :meth:`save_pretrained`; or a Hub id.
            options: ``add_markers``.

        Raises:
            TokenizerError: if there is no such tokenizer, or it cannot be read.
            ConfigError: if an option does not exist.
        """
        if path is None:
            raise TokenizerError("hf_text is read from a tokenizer.json, a folder or a Hub id; 'text' is what ships")
        file, config = Path(path).expanduser(), cls.Config()
        if (file / "hf_text_tokenizer.json").is_file():
            config = read_config(cls, file / "hf_text_tokenizer.json")
            file = file / "hf_text_tokenizer"
        elif not file.exists() and (not isinstance(path, str) or str(path).startswith((".", "/", "~"))):
            raise TokenizerError(f"no tokenizer at {path}; pass a tokenizer.json, a folder, or a Hub id")
        config = config.replace(**options)
        # A folder with nothing but the file needs no class of transformers to say what it means.
        if file.is_dir() and (file / "tokenizer.json").is_file() and not (file / "tokenizer_config.json").is_file():
            file = file / "tokenizer.json"
        if file.is_file():
            try:
                return cls(config, model=tokenizers.Tokenizer.from_file(str(file)))
            except Exception as error:  # the library raises bare Exception
                raise TokenizerError(f"{file} is not a tokenizer file: {error}") from None
        from transformers import AutoTokenizer

        with quiet_transformers():
            try:
                model = AutoTokenizer.from_pretrained(str(file) if file.exists() else str(path))
            except Exception as error:  # whatever a wrong folder makes the library raise
                raise TokenizerError(f"{path} cannot be read as a tokenizer: {error}") from error
        return cls(config, model=model)

    def save_pretrained(self, path: str | PathLike[str]) -> None:
        """Writes ``hf_text_tokenizer.json`` and a folder ``hf_text_tokenizer`` with the other tokenizer's files."""
        folder = Path(path).expanduser() / "hf_text_tokenizer"
        folder.mkdir(parents=True, exist_ok=True)
        if isinstance(self.model, tokenizers.Tokenizer):
            self.model.save(str(folder / "tokenizer.json"), pretty=False)
        else:
            self.model.save_pretrained(str(folder))
        write_config(self.config, folder.with_suffix(".json"))

"""Text as UTF-8 bytes: nothing to train, nothing to load, every string comes back exactly.

The first sixteen ids are the markers, as in :mod:`omnimoe.tokenizers.text`, so either may be the text of a model.
"""

from __future__ import annotations

from os import PathLike
from typing import Any, Self

import torch
from torch import Tensor

from omnimoe.tokenizers.base import Tokenizer, TokenizerError, register_tokenizer
from omnimoe.tokenizers.text import SPECIAL_TOKENS, check_text

_FIRST = len(SPECIAL_TOKENS)


@register_tokenizer("bytes")
class ByteTokenizer(Tokenizer):
    """Byte ``b`` is id ``16 + b``.

    Example:
        >>> tokenizer = ByteTokenizer.from_pretrained()
        >>> tokenizer.encode("aé").tolist(), tokenizer.vocab_size
        ([113, 211, 185], 272)
    """

    modality = "text"
    vocab_size = _FIRST + 256

    def encode(self, raw: Any) -> Tensor:
        """A string to ids ``(bytes,)`` int64, each from 16 on; markers in the text are text.

        Raises:
            TokenizerError: if ``raw`` is not a string of Unicode characters.
        """
        return torch.tensor(list(check_text(raw).encode()), dtype=torch.int64) + _FIRST

    def decode(self, ids: Any) -> str:
        """Ids ``(n,)`` to text. Markers are left out; bytes that are no whole character become U+FFFD.

        Raises:
            TokenizerError: if an id is out of range, or there is more than one axis.
        """
        ids = self.check_ids(ids)
        if ids.ndim != 1:
            raise TokenizerError(f"decode takes one text, (n,) ids, not {tuple(ids.shape)}; call it once a row")
        return bytes((ids[ids >= _FIRST] - _FIRST).tolist()).decode(errors="replace")

    @classmethod
    def from_pretrained(cls, path: str | PathLike[str] | None = None) -> Self:
        """The tokenizer; ``path`` is not read, for there is nothing to load."""
        return cls(cls.Config())

    def save_pretrained(self, path: str | PathLike[str]) -> None:
        """Writes nothing: bytes need no table."""

"""Text as it is written, through transformers' streamers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor
from transformers import TextStreamer

from omnimoe.model import OmniMoeConfig
from omnimoe.spans import bounded_ranges, owned_rows
from omnimoe.tokenizers import Tokenizer


class TextSpanStreamer(TextStreamer):
    """Hands on text in whole words while a sequence is generated; a streamer for ``model.generate`` of one row.

    What it hands on, joined, is what the tokenizer decodes of the text spans. Other modalities are passed over.

    Args:
        config: the model's.
        tokenizer: of ``name``.
        write: takes each piece.
        name: the modality that is text.
    """

    def __init__(
        self, config: OmniMoeConfig, tokenizer: Tokenizer, write: Callable[[str], Any], *, name: str = "text"
    ) -> None:
        # it decodes as transformers' tokenizers do: a list of ids to a string
        super().__init__(tokenizer, skip_prompt=True)
        self.next_tokens_are_prompt: bool = True
        self._rows = owned_rows(config)[name]
        self._start = config.token_ranges[name].start
        self._begins = {held.begin_id for held in bounded_ranges(config).values()}
        self._write = write

    def put(self, value: Tensor) -> None:
        """Takes the prompt, then token by token."""
        if self.next_tokens_are_prompt or value.ndim > 1:
            super().put(value)
            return
        for token in value:
            if bool(self._rows[token]):
                super().put((token - self._start).unsqueeze(0))
            elif int(token) in self._begins:
                # another span begins, so the last word is whole
                self.end()
                self.next_tokens_are_prompt = False

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Hands a piece on."""
        if text:
            self._write(text)

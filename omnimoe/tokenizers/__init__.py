"""Tokenizers: text, pictures, speech and video to ids or vectors and back, with small weights that ship."""

from __future__ import annotations

from omnimoe.tokenizers.base import (
    SHIPPED,
    TOKENIZERS,
    Encoded,
    Tokenizer,
    TokenizerError,
    load_tokenizer,
    register_tokenizer,
)

__all__ = ["SHIPPED", "TOKENIZERS", "Encoded", "Tokenizer", "TokenizerError", "load_tokenizer", "register_tokenizer"]

"""Tokenizers: text, pictures and speech to discrete ids and back, with small weights that ship with the package."""

from __future__ import annotations

from omnimoe.tokenizers.base import TOKENIZERS, Tokenizer, TokenizerError, load_tokenizer, register_tokenizer

__all__ = ["TOKENIZERS", "Tokenizer", "TokenizerError", "load_tokenizer", "register_tokenizer"]

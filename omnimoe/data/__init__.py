"""Data: sources, the builder of set P, the shipped token corpus, packed sequences.

Names load on first use, so that reading the shipped corpus needs none of what building one needs.
"""

from __future__ import annotations

import importlib
from typing import Any

_PLACES = {
    "Corpus": "corpus",
    "CorpusError": "corpus",
    "Example": "corpus",
    "shipped_corpora": "corpus",
    "PackedSequences": "sequences",
    "SequenceError": "documents",
    "default_ranges": "documents",
    "evaluation_batches": "evaluation",
    "build_corpus": "build",
    "tokenize_corpus": "tokenize",
    "check_leaks": "splits",
    "LeakError": "splits",
    "Source": "sources",
    "SourceError": "sources",
    "fetch": "sources",
}

__all__ = sorted(_PLACES)  # noqa: PLE0605 - a list of strings, made from the table


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module 'omnimoe.data' has no attribute {name!r}; it has {', '.join(__all__)}")
    value = getattr(importlib.import_module(f"omnimoe.data.{_PLACES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__

"""Data: sources, the builder of set P, the shipped token corpus, packed sequences.

Names load on first use, so that reading the shipped corpus needs none of what building one needs.
"""

from __future__ import annotations

from omnimoe.lazy import lazy

__getattr__, __dir__, __all__ = lazy(
    __name__,
    {
        "omnimoe.data.corpus": ("Corpus", "CorpusError", "Example", "shipped_corpora"),
        "omnimoe.data.sequences": ("PackedSequences",),
        "omnimoe.data.documents": ("SequenceError", "default_ranges"),
        "omnimoe.data.evaluation": ("evaluation_batches",),
        "omnimoe.data.templates": ("register_template",),
        "omnimoe.data.readers": ("open_reader",),
        "omnimoe.data.stream": ("DocumentStream", "StreamError"),
        "omnimoe.data.streaming": ("StreamedSequences",),
        "omnimoe.data.own": ("build_own",),
        "omnimoe.data.build": ("build_corpus",),
        "omnimoe.data.tokenize": ("tokenize_corpus",),
        "omnimoe.data.retokenize": ("retokenize_corpus",),
        "omnimoe.data.splits": ("check_leaks", "LeakError"),
        "omnimoe.data.sources": ("Source", "SourceError", "fetch"),
    },
)

"""Interleaved documents: the spans of one row in some order, as rows of a partitioned vocabulary.

A document is ``<bos> span ... span <eos>``. A text span is its ids; a picture or clip stands between its boundary
markers. Markers belong to the group of text, because what decides them is text-like: whether a picture comes next.

Positions have three axes, time, row and column. Every token advances time by one, tokens of a picture too, so that a
document of n tokens has times 0..n-1. Row and column equal the time, except inside a picture that starts at time s: the
cell (r, c) has row s + r and column s + c. This differs from Qwen2-VL, whose pictures stand still in time.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from omnimoe.data.corpus import MODALITIES, Corpus, Example
from omnimoe.modalities.vocabulary import TokenRange
from omnimoe.tokenizers.text import BOS_ID, EOS_ID, PAD_ID, SPECIAL_TOKENS

_MARKERS = {"image": ("<image>", "</image>"), "speech": ("<speech>", "</speech>")}


class SequenceError(ValueError):
    """Ranges, lengths or modalities that do not fit each other or the corpus."""


@dataclass(frozen=True, kw_only=True)
class Piece:
    """A document or a part of one, without padding.

    Args:
        ids: ``(n,)`` int64, rows of the vocabulary.
        modality_ids: ``(n,)`` int64, index into the ranges.
        positions: ``(n, 3)`` int64: time, row, column, from 0.
    """

    ids: np.ndarray
    modality_ids: np.ndarray
    positions: np.ndarray

    def __len__(self) -> int:
        return len(self.ids)


def default_ranges(corpus: Corpus | None = None, modalities: Sequence[str] = MODALITIES) -> dict[str, TokenRange]:
    """The usual partition: text from 0 (its markers are the first sixteen), then pictures, then speech.

    Args:
        corpus: take sizes from it; None for the sizes of the shipped tokenizers.
        modalities: those wanted, text among them, in the order of the vocabulary.

    Returns:
        Modality to range, in that order.

    Raises:
        SequenceError: if text is missing or a name is unknown.
    """
    if "text" not in modalities or any(name not in MODALITIES for name in modalities):
        raise SequenceError(f"modalities must be text and others of {', '.join(MODALITIES)}, got {tuple(modalities)!r}")
    if corpus is not None:
        sizes, lengths = corpus.vocab_sizes, dict(corpus.meta["num_tokens"])
    else:
        from omnimoe.data.tokenize import TOKENIZERS
        from omnimoe.tokenizers.base import load_tokenizer

        loaded = {name: load_tokenizer(TOKENIZERS[name]) for name in modalities}
        sizes = {name: tokenizer.vocab_size for name, tokenizer in loaded.items()}
        lengths = {name: tokenizer.num_tokens for name, tokenizer in loaded.items()}
    ranges, start = {}, 0
    for name in sorted(modalities, key=lambda name: name != "text"):
        begin, end = (SPECIAL_TOKENS.index(marker) for marker in _MARKERS[name]) if name in _MARKERS else (None, None)
        ranges[name] = TokenRange(
            name=name, start=start, size=sizes[name], begin_id=begin, end_id=end, num_tokens=lengths[name]
        )
        start += sizes[name]
    return ranges


class DocumentBuilder:
    """Builds documents in one vocabulary.

    Args:
        corpus: where ids and grids come from.
        ranges: modality to range; the order numbers ``modality_ids``.
        modalities: modalities to use; the others are left out of every document.

    Raises:
        SequenceError: if a range is missing, too small for the corpus, overlaps another, or lacks markers.
    """

    def __init__(
        self, corpus: Corpus, ranges: Mapping[str, TokenRange], modalities: Sequence[str] = MODALITIES
    ) -> None:
        _check_ranges(corpus, ranges, modalities)
        self.corpus = corpus
        self.ranges = dict(ranges)
        self.modalities = tuple(modalities)
        self._number = {name: i for i, name in enumerate(ranges)}
        self._grids = corpus.grids
        text = ranges["text"]
        self.text_number = self._number["text"]
        self.bos_id, self.eos_id, self.pad_id = text.start + BOS_ID, text.start + EOS_ID, text.start + PAD_ID

    def orders(self, example: Example, longest: int) -> list[tuple[str, ...]]:
        """Every way to tell a row: all permutations of two or more of its modalities that fit into ``longest`` tokens.

        A row that has one of the wanted modalities only is told by that one.
        """
        lengths = {
            name: self.span_length(name, len(ids)) for name in self.modalities if (ids := example.get(name)) is not None
        }
        counts = range(min(2, len(lengths)), len(lengths) + 1)
        found = itertools.chain.from_iterable(itertools.permutations(lengths, count) for count in counts if count)
        return [order for order in found if 2 + sum(lengths[name] for name in order) <= longest]

    def span_length(self, modality: str, num_ids: int) -> int:
        """Tokens of a span with its markers."""
        return num_ids + (0 if self.ranges[modality].begin_id is None else 2)

    def document(self, example: Example, order: Sequence[str]) -> Piece:
        """The row as one document, its spans in ``order``."""
        ids, numbers = [np.array([self.bos_id])], [np.array([self.text_number])]
        pictures = []
        length = 1
        for name in order:
            local = example.get(name)
            if local is None:
                raise SequenceError(f"row {example.index} has no {name}; choose an order of what it has")
            token_range = self.ranges[name]
            span = local + token_range.start
            number = np.full(len(span), self._number[name])
            if token_range.begin_id is not None:
                span = np.concatenate([[token_range.begin_id], span, [token_range.end_id]])
                number = np.concatenate([[self.text_number], number, [self.text_number]])
                if name in self._grids:
                    pictures.append((length + 1, len(local), self._grids[name][1]))
            ids.append(span)
            numbers.append(number)
            length += len(span)
        ids.append(np.array([self.eos_id]))
        numbers.append(np.array([self.text_number]))
        positions = _running_positions(length + 1)
        for start, count, columns in pictures:
            cells = np.arange(count)
            positions[start : start + count, 1] = start + cells // columns
            positions[start : start + count, 2] = start + cells % columns
        return Piece(ids=np.concatenate(ids), modality_ids=np.concatenate(numbers), positions=positions)

    def running_text(self, text: int, offset: int, longest: int) -> Piece:
        """A part of a document of running text.

        Args:
            text: index into the corpus' texts.
            offset: first token of the part; the document is ``<bos> ids <eos>``, so a later part has no ``<bos>``.
            longest: most tokens to take.
        """
        ids = self.corpus.texts[text] + self.ranges["text"].start
        whole = np.concatenate([[self.bos_id], ids, [self.eos_id]])[offset : offset + longest]
        return Piece(
            ids=whole, modality_ids=np.full(len(whole), self.text_number), positions=_running_positions(len(whole))
        )


def _running_positions(length: int) -> np.ndarray:
    return np.repeat(np.arange(length)[:, None], 3, axis=1)


def _check_ranges(corpus: Corpus, ranges: Mapping[str, TokenRange], modalities: Sequence[str]) -> None:
    unknown = [name for name in modalities if name not in MODALITIES]
    if unknown or not modalities or len(set(modalities)) != len(modalities):
        raise SequenceError(f"modalities must be some of {', '.join(MODALITIES)}, each once, got {tuple(modalities)!r}")
    for name in {"text", *modalities}:
        if name not in ranges:
            raise SequenceError(
                f"ranges have no {name!r}, only {', '.join(ranges)}; text always needs one, it holds the markers"
            )
        needed = corpus.vocab_sizes[name]
        if ranges[name].size < needed:
            raise SequenceError(
                f"the range of {name} has {ranges[name].size} rows, the corpus uses {needed}; make it as large"
            )
        if name != "text" and (ranges[name].begin_id is None or ranges[name].end_id is None):
            raise SequenceError(f"the range of {name} has no begin_id and end_id; its spans need boundary markers")
    ordered = sorted(ranges.values(), key=lambda r: r.start)
    for before, after in itertools.pairwise(ordered):
        if before.stop > after.start:
            raise SequenceError(
                f"ranges overlap: {before.name} ends at {before.stop}, {after.name} starts at {after.start}"
            )

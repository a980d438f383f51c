"""Interleaved documents: the spans of one row in some order, as rows of a partitioned vocabulary.

A document is ``<bos> span ... span <eos>``. A text span is its ids; a picture or clip stands between its boundary
markers. Markers belong to the group of text, because what decides them is text-like: whether a picture comes next.

Positions have three axes, time, row and column. Every token advances time by one, tokens of a picture too, so that a
document of n tokens has times 0..n-1. Row and column equal the time, except inside a picture or video that starts at
time s: the cell (r, c) of a frame has row s + r and column s + c. This differs from Qwen2-VL, whose pictures stand
still in time.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from omnimoe.data.corpus import MODALITIES, Corpus, Example
from omnimoe.data.splits import SPLITS
from omnimoe.modalities.vocabulary import TokenRange
from omnimoe.tokenizers.base import MARKERS, SHIPPED, Tokenizer, load_tokenizer
from omnimoe.tokenizers.text import BOS_ID, EOS_ID, PAD_ID, SPECIAL_TOKENS

logger = logging.getLogger(__name__)

IGNORE = -100


class SequenceError(ValueError):
    """Ranges, lengths or modalities that do not fit each other or the corpus."""


@dataclass(frozen=True, kw_only=True)
class Piece:
    """A document or a part of one, without padding.

    Args:
        ids: ``(n,)`` int64, rows of the vocabulary.
        modality_ids: ``(n,)`` int64, index into the ranges.
        positions: ``(n, 3)`` int64: time, row, column, from 0.
        learned: ``(n,)`` bool, tokens that carry a label; None for all.
    """

    ids: np.ndarray
    modality_ids: np.ndarray
    positions: np.ndarray
    learned: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.ids)


def default_ranges(
    corpus: Corpus | None = None,
    modalities: Sequence[str] = MODALITIES,
    tokenizers: Mapping[str, Tokenizer] | None = None,
) -> dict[str, TokenRange]:
    """The usual partition: text from 0 (its markers are the first sixteen), then pictures, then speech.

    Args:
        corpus: take sizes from it; None for the sizes of the shipped tokenizers.
        modalities: those wanted, text among them, in the order of the vocabulary; ``"video"`` too where there is no
            corpus.
        tokenizers: modality to tokenizer, to take sizes from where there is no corpus.

    Returns:
        Modality to range, in that order.

    Raises:
        SequenceError: if text is missing or a name is unknown.
    """
    known = MODALITIES if corpus is not None else tuple(SHIPPED)
    if "text" not in modalities or any(name not in known for name in modalities):
        raise SequenceError(f"modalities must be text and others of {', '.join(known)}, got {tuple(modalities)!r}")
    if corpus is not None:
        sizes, lengths = corpus.vocab_sizes, dict(corpus.meta["num_tokens"])
        frames = dict(corpus.meta.get("frame_sizes", {}))  # corpora of older versions do not say
    else:
        given = tokenizers or {}
        loaded = {name: given[name] if name in given else load_tokenizer(SHIPPED[name]) for name in modalities}
        sizes = {name: tokenizer.vocab_size for name, tokenizer in loaded.items()}
        lengths = {name: tokenizer.num_tokens for name, tokenizer in loaded.items()}
        frames = {name: tokenizer.frame_size for name, tokenizer in loaded.items()}
    ranges, start = {}, 0
    for name in sorted(modalities, key=lambda name: name != "text"):
        begin, end = (SPECIAL_TOKENS.index(marker) for marker in MARKERS[name]) if name in MARKERS else (None, None)
        ranges[name] = TokenRange(
            name=name,
            start=start,
            size=sizes[name],
            begin_id=begin,
            end_id=end,
            num_tokens=lengths[name],
            frame_size=frames.get(name, 1),
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
        present = [name for name in self.modalities if example.get(name) is not None]
        counts = range(min(2, len(present)), len(present) + 1)
        found = itertools.chain.from_iterable(itertools.permutations(present, count) for count in counts if count)
        return [order for order in found if self.document_length(example, order) <= longest]

    def document_length(self, example: Example, order: Sequence[str]) -> int:
        """Tokens of :meth:`document`, without making it."""
        length = 2
        for name in order:
            ids = example.get(name)
            if ids is None:
                raise SequenceError(f"row {example.index} has no {name}; choose an order of what it has")
            length += len(ids) + (0 if self.ranges[name].begin_id is None else 2)
        return length

    def document(self, example: Example, order: Sequence[str]) -> Piece:
        """The row as one document, its spans in ``order``."""
        spans: list[tuple[str, np.ndarray]] = []
        for name in order:
            ids = example.get(name)
            if ids is None:
                raise SequenceError(f"row {example.index} has no {name}; choose an order of what it has")
            spans.append((name, ids))
        return lay_out(spans, self.ranges, bos_id=self.bos_id, eos_id=self.eos_id, grids=self._grids)

    def length(self, row: int, order: Sequence[Any]) -> int:
        """Tokens of :meth:`piece`, without making it."""
        if row < len(self.corpus):
            return self.document_length(self.corpus[row], order)
        return int(order[1] - order[0])

    def piece(self, row: int, order: Sequence[Any]) -> Piece:
        """The document of a row told in an order; or, for numbers past the rows, a part of an interleaved document.

        Args:
            row: number of a row, or the number of rows plus that of an interleaved document.
            order: modalities in order; for an interleaved document the first token and one past the last.
        """
        if row < len(self.corpus):
            return self.document(self.corpus[row], order)
        whole = self.interleaved(row - len(self.corpus))
        start, end = order
        return cut(whole, start, end)

    def interleaved(self, index: int) -> Piece:
        """An interleaved document as a whole; spans of modalities that are not used are left out."""
        spans = [(name, ids) for name, ids in self.corpus.interleaved_spans(index) if name in self.modalities]
        return lay_out(spans, self.ranges, bos_id=self.bos_id, eos_id=self.eos_id, grids=self._grids)

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


def tellable(
    builder: DocumentBuilder, split: str, languages: Sequence[str] | None, length: int
) -> tuple[np.ndarray, list[list[tuple[Any, ...]]]]:
    """Rows of a split that fit ``length`` tokens, ``(n,)`` int64, and the orders in which each can be told.

    Interleaved documents follow with numbers past those of the rows, once for each part that fits; see
    :meth:`DocumentBuilder.piece`.
    """
    rows: list[int] = []
    orders: list[list[tuple[Any, ...]]] = []
    left_out = 0
    shared: dict[tuple[tuple[str, ...], ...], list[tuple[str, ...]]] = {}
    for row in rows_to_tell(builder.corpus, split, languages):
        choices = builder.orders(builder.corpus[int(row)], length)
        if not choices:
            left_out += 1
            continue
        rows.append(int(row))
        orders.append(shared.setdefault(tuple(choices), choices))
    if builder.corpus.interleaved is not None:
        for index in np.flatnonzero(builder.corpus.interleaved.splits == SPLITS.index(split)).tolist():
            piece = builder.interleaved(index)
            parts = fitting_parts(places_to_cut(piece, builder.ranges), length)
            if parts is None or len(piece) == 2:
                left_out += 1
                continue
            rows += [len(builder.corpus) + index] * len(parts)
            orders += [[part] for part in parts]
    if left_out:
        logger.warning("%d rows of split %s do not fit %d tokens and are left out", left_out, split, length)
    return np.array(rows, dtype=np.int64), orders


def rows_to_tell(corpus: Corpus, split: str, languages: Sequence[str] | None) -> np.ndarray:
    """Rows of a split, ``(n,)`` int64: of the languages named, of all where None, or as the corpus says where empty.

    A corpus says ``"en"``, English, as set P does; ``"spoken"``, English and what is read aloud in any language, as set
    S does; or ``"all"``, as one of own data does.
    """
    told = corpus.meta.get("told", "en")
    if languages is None or len(languages) or told == "en":
        named = ("en",) if languages is not None and not len(languages) else languages
        return corpus.select(split, languages=named, having=())
    rows = corpus.select(split, languages=None, having=())
    if told == "all":
        return rows
    english = corpus.rows["lang"][rows] == corpus.meta["languages"].index("en")
    return rows[english | (corpus.rows["audio"][rows] >= 0)]


class Markers(Protocol):
    """What :func:`collate` asks of a builder: the row of padding, and the number of text among the modalities."""

    pad_id: int
    text_number: int


def collate(sequences: list[list[Piece]], builder: Markers, length: int, axes: int) -> dict[str, Tensor]:
    """Pieces to one batch; :class:`omnimoe.data.sequences.PackedSequences` says what it holds."""
    shape = (len(sequences), length)
    ids = np.full(shape, builder.pad_id, dtype=np.int64)
    labels = np.full(shape, IGNORE, dtype=np.int64)
    modality_ids = np.full(shape, builder.text_number, dtype=np.int64)
    segments = np.full(shape, -1, dtype=np.int64)
    positions = np.zeros((*shape, 3), dtype=np.int64)
    for row, pieces in enumerate(sequences):
        start = 0
        for number, piece in enumerate(pieces):
            end = start + len(piece)
            ids[row, start:end] = piece.ids
            labels[row, start + 1 : end] = piece.ids[1:]
            if piece.learned is not None:
                labels[row, start:end][~piece.learned] = IGNORE
            modality_ids[row, start:end] = piece.modality_ids
            segments[row, start:end] = number
            positions[row, start:end] = piece.positions
            start = end
    arrays = {
        "input_ids": ids,
        "labels": labels,
        "modality_ids": modality_ids,
        "segment_ids": segments,
        "position_ids": positions if axes == 3 else positions[..., 0].copy(),
    }
    return {key: torch.from_numpy(array) for key, array in arrays.items()}


def cut(piece: Piece, start: int, end: int) -> Piece:
    """A part of a document; its positions start at 0."""
    part = slice(start, end)
    return Piece(ids=piece.ids[part], modality_ids=piece.modality_ids[part], positions=piece.positions[part] - start)


def places_to_cut(piece: Piece, ranges: Mapping[str, TokenRange]) -> np.ndarray:
    """``(n + 1,)`` bool: whether a document may be cut before each token, and after the last: not inside a span that
    stands between markers."""
    begins = [held.begin_id for held in ranges.values() if held.begin_id is not None]
    ends = [held.end_id for held in ranges.values() if held.end_id is not None]
    inside = np.cumsum(np.isin(piece.ids, begins).astype(np.int64) - np.isin(piece.ids, ends))
    return np.concatenate([[True], inside == 0])


def fitting_parts(places: np.ndarray, longest: int) -> list[tuple[int, int]] | None:
    """Parts of at most ``longest`` tokens that make up a document; None if a span by itself is longer."""
    allowed = np.flatnonzero(places)
    parts, start = [], 0
    while start < len(places) - 1:
        end = int(allowed[np.searchsorted(allowed, start + longest, side="right") - 1])
        if end <= start:
            return None
        parts.append((start, end))
        start = end
    return parts


def check_sizes(sequence_length: int, batch_size: int, axes: int) -> None:
    """Raises SequenceError if one of the sizes of a batch is out of range."""
    if isinstance(sequence_length, bool) or not isinstance(sequence_length, int) or sequence_length < 8:
        raise SequenceError(f"sequence_length must be an integer of at least 8, got {sequence_length!r}")
    if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
        raise SequenceError(f"batch_size must be a positive integer, got {batch_size!r}")
    if axes not in (1, 3):
        raise SequenceError(f"axes must be 1 or 3, got {axes!r}")


def lay_out(
    spans: Sequence[tuple[str, np.ndarray]],
    ranges: Mapping[str, TokenRange],
    *,
    bos_id: int | None,
    eos_id: int | None = None,
    opened: str | None = None,
    grids: Mapping[str, Sequence[int]] | None = None,
) -> Piece:
    """Puts spans into one document, or into the start of one.

    Args:
        spans: modality and local ids ``(n,)``, in order.
        ranges: modality to its range; the order numbers ``modality_ids``, and markers count as text.
        bos_id: row that begins the document; None for none.
        eos_id: row that ends it; None leaves it open, as a prompt is.
        opened: modality whose begin marker comes last; one without markers opens by itself.
        grids: rows and columns of a picture, or of each frame of a video, by modality.

    Returns:
        The piece.

    Raises:
        SequenceError: if a modality has no range.
    """
    unknown = [name for name in (*(name for name, _ in spans), *([opened] if opened else [])) if name not in ranges]
    if unknown:
        raise SequenceError(f"there is no range for {unknown[0]!r}; the vocabulary has {', '.join(ranges)}")
    number_of = {name: number for number, name in enumerate(ranges)}
    markers, ids, numbers, pictures = number_of.get("text", 0), [], [], []

    def mark(row: int | None) -> None:
        if row is not None:
            ids.append(row)
            numbers.append(markers)

    mark(bos_id)
    for name, local in spans:
        held = ranges[name]
        mark(held.begin_id)
        if held.begin_id is not None and grids and name in grids:
            pictures.append((len(ids), len(local), *grids[name]))
        ids.extend((np.asarray(local, dtype=np.int64) + held.start).tolist())
        numbers.extend([number_of[name]] * len(local))
        mark(held.end_id)
    mark(ranges[opened].begin_id if opened else None)
    mark(eos_id)
    positions = _running_positions(len(ids))
    for start, count, rows, columns in pictures:
        cells = np.arange(count) % (rows * columns)
        positions[start : start + count, 1] = start + cells // columns
        positions[start : start + count, 2] = start + cells % columns
    return Piece(ids=np.array(ids, np.int64), modality_ids=np.array(numbers, np.int64), positions=positions)


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

"""Finite batches over a held-out split: every document once, none cut short, the same each time."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
from torch import Tensor

from omnimoe.data.corpus import MODALITIES, Corpus
from omnimoe.data.documents import DocumentBuilder, Piece, SequenceError, check_sizes, collate, tellable
from omnimoe.modalities.vocabulary import TokenRange


def evaluation_batches(
    corpus: Corpus,
    ranges: Mapping[str, TokenRange],
    *,
    sequence_length: int,
    batch_size: int,
    split: str = "val",
    seed: int = 0,
    modalities: Sequence[str] = MODALITIES,
    languages: Sequence[str] | None = (),
    order: Sequence[str] | None = None,
    running_text: bool = True,
    max_batches: int | None = None,
    axes: int = 3,
) -> Iterator[dict[str, Tensor]]:
    """Every row of a split once, then its running text once; the same batches each time.

    Nothing is cut short: where the next document does not fit, the sequence ends in padding. Batches are as those of
    :class:`omnimoe.data.sequences.PackedSequences`; the last may have fewer rows.

    Args:
        corpus: as in :class:`PackedSequences`; so are ``ranges`` to ``languages`` and ``axes``.
        ranges: see there.
        sequence_length: T.
        batch_size: B.
        split: ``"val"``, ``"test"``, ``"drawing"`` or ``"train"``.
        seed: draws the order of the spans of each row.
        modalities: modalities to use.
        languages: languages of the captions; see there.
        order: one order for all rows, such as ``("image", "text")``; rows that lack one are left out. None draws one a
            row.
        running_text: whether running text comes too.
        max_batches: stop after so many batches.
        axes: 3 or 1 position axes.

    Raises:
        SequenceError: if an argument is out of range or nothing fits.
    """
    check_sizes(sequence_length, batch_size, axes)
    builder = DocumentBuilder(corpus, ranges, modalities)
    if order is not None and (not order or len(set(order)) != len(order) or not set(order) <= set(modalities)):
        raise SequenceError(f"order must name modalities of {', '.join(modalities)}, each once, got {order!r}")
    pieces = _evaluation_pieces(
        builder, split, seed, languages, order, running_text and "text" in modalities, sequence_length
    )
    # The first piece is made now, so that an empty choice is an error here and not an empty loop somewhere else.
    first = next(pieces, None)
    if first is None:
        raise SequenceError(
            f"split {split!r} has nothing of {', '.join(order or modalities)} that fits {sequence_length} tokens"
        )
    return _batches(first, pieces, builder, sequence_length, batch_size, axes, max_batches)


def _evaluation_pieces(
    builder: DocumentBuilder,
    split: str,
    seed: int,
    languages: Sequence[str] | None,
    order: Sequence[str] | None,
    running_text: bool,
    length: int,
) -> Iterator[Piece]:
    corpus = builder.corpus
    rows, orders = tellable(builder, split, languages, length)
    draws = np.random.default_rng([seed, 2]).random(len(rows))
    for row, choices, draw in zip(rows, orders, draws, strict=True):
        if order is None:
            yield builder.piece(int(row), choices[int(draw * len(choices))])
        elif row >= len(corpus):
            continue  # an interleaved document has an order of its own
        elif tuple(order) in choices or (len(order) == 1 and corpus[int(row)].get(order[0]) is not None):
            yield builder.document(corpus[int(row)], order)
    if running_text:
        for text in corpus.documents["text"][corpus.select_documents(split)]:
            total = len(corpus.texts[int(text)]) + 2
            for offset in range(0, total, length):
                yield builder.running_text(int(text), offset, length)


def _batches(
    first: Piece,
    rest: Iterator[Piece],
    builder: DocumentBuilder,
    length: int,
    batch_size: int,
    axes: int,
    max_batches: int | None,
) -> Iterator[dict[str, Tensor]]:
    sequences: list[list[Piece]] = [[first]]
    room, made = length - len(first), 0
    for piece in rest:
        if len(piece) > room:
            if len(sequences) == batch_size:
                yield collate(sequences, builder, length, axes)
                made += 1
                if made == max_batches:
                    return
                sequences = []
            sequences.append([])
            room = length
        sequences[-1].append(piece)
        room -= len(piece)
    yield collate(sequences, builder, length, axes)

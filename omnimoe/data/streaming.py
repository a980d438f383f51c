"""Packed training sequences from a stream of raw documents: tokenized on the way, bounded in memory, resumable.

The batches are those of :class:`omnimoe.data.sequences.PackedSequences`. Rows are told in a random order of their
modalities and never cut. Documents whose spans have an order, and plain text, may be cut between tokens of text, but
not inside a picture or clip; one of them is kept aside and fills what is left of a sequence where the next row does not
fit.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
from torch import Tensor
from torch.utils.data import IterableDataset

from omnimoe.data.corpus import MODALITIES
from omnimoe.data.documents import (
    Piece,
    SequenceError,
    check_sizes,
    collate,
    cut,
    default_ranges,
    lay_out,
    places_to_cut,
)
from omnimoe.data.readers.base import Document, DocumentError, Item, decode
from omnimoe.data.stream import DocumentStream, StreamError
from omnimoe.modalities.vocabulary import TokenRange
from omnimoe.tokenizers.base import SHIPPED, Tokenizer, TokenizerError, load_tokenizer
from omnimoe.tokenizers.text import BOS_ID, EOS_ID, PAD_ID

logger = logging.getLogger(__name__)

Spans = list[tuple[str, np.ndarray]]


@dataclass(kw_only=True)
class _Open:
    """A document on its way into sequences: ``place`` is shard, index and epoch, ``offset`` what was taken of it."""

    place: tuple[int, int, int]
    piece: Piece
    cuts: np.ndarray | None
    offset: int = 0

    def take(self, room: int) -> Piece | None:
        """The next part of at most ``room`` tokens, None if nothing fits."""
        end = min(len(self.piece), self.offset + room)
        if self.cuts is None:
            if end < len(self.piece):
                return None
        else:
            while end > self.offset and not self.cuts[end]:
                end -= 1
            if end == self.offset:
                return None
        part = cut(self.piece, self.offset, end)
        self.offset = end
        return part

    @property
    def is_done(self) -> bool:
        return self.offset == len(self.piece)


class StreamedSequences(IterableDataset[dict[str, Tensor]]):
    """Batches of packed documents from a stream; an iterator, and a dataset for a loader with ``batch_size=None``.

    Args:
        stream: the documents. It is this object's own from here on; take the state from here.
        ranges: modality to its range of the vocabulary; None for :func:`omnimoe.data.default_ranges` of the tokenizers.
            Spans of other modalities are left out.
        tokenizers: modality to tokenizer; those missing are the shipped ones. Without ranges, video is told only where
            its tokenizer is given.
        sequence_length: T.
        batch_size: B, of one taker.
        axes: 3 or 1 position axes.

    Raises:
        SequenceError: if an argument is out of range.

    Example:
        A thousand documents are drawn from, and batches are made beside the training::

            stream = DocumentStream(open_reader("my-folder"), on_error="skip")
            batches = StreamedSequences(stream, sequence_length=256, batch_size=8)
            loader = StatefulDataLoader(batches, batch_size=None, num_workers=2)
    """

    def __init__(
        self,
        stream: DocumentStream,
        ranges: Mapping[str, TokenRange] | None = None,
        *,
        tokenizers: Mapping[str, Tokenizer] | None = None,
        sequence_length: int,
        batch_size: int,
        axes: int = 3,
    ) -> None:
        check_sizes(sequence_length, batch_size, axes)
        given = tokenizers or {}
        names = list(ranges) if ranges else [name for name in SHIPPED if name in MODALITIES or name in given]
        self.tokenizers = {
            name: given.get(name) or load_tokenizer(SHIPPED[name]) for name in names if name in given or name in SHIPPED
        }
        self.ranges = dict(ranges or default_ranges(modalities=names, tokenizers=self.tokenizers))
        if "text" not in self.ranges:
            raise SequenceError(f"ranges have no 'text', only {', '.join(self.ranges)}; it holds the markers")
        for name, tokenizer in self.tokenizers.items():
            if tokenizer.vocab_size > self.ranges[name].size:
                raise SequenceError(
                    f"the range of {name} has {self.ranges[name].size} rows, its tokenizer {tokenizer.vocab_size} ids"
                )
        self.stream, self.sequence_length, self.batch_size, self.axes = stream, sequence_length, batch_size, axes
        text = self.ranges["text"]
        self.text_number = list(self.ranges).index("text")
        self.bos_id, self.eos_id, self.pad_id = text.start + BOS_ID, text.start + EOS_ID, text.start + PAD_ID
        self._grids = {name: tokenizer.grid for name, tokenizer in self.tokenizers.items() if tokenizer.grid}
        self._pending: _Open | None = None
        self._aside: _Open | None = None
        self._fitted_in = 0

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> dict[str, Tensor]:
        sequences: list[list[Piece]] = []
        while len(sequences) < self.batch_size and (pieces := self._sequence()):
            sequences.append(pieces)
        if not sequences:
            raise StopIteration
        return collate(sequences, self, self.sequence_length, self.axes)

    def state_dict(self) -> dict[str, Any]:
        """Where the iteration is: plain integers, strings and lists."""
        return {
            "stream": self.stream.state_dict(),
            "pending": None if self._pending is None else [*self._pending.place, self._pending.offset],
            "aside": None if self._aside is None else [*self._aside.place, self._aside.offset],
            "fitted_in": self._fitted_in,
            "sequence_length": self.sequence_length,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on exactly after the batch that preceded :meth:`state_dict`.

        Raises:
            StreamError: if the state is of another stream or sequence length.
        """
        if not isinstance(state, dict) or "stream" not in state or "aside" not in state:
            raise StreamError("this is no state of StreamedSequences; pass what state_dict returned")
        if state["sequence_length"] != self.sequence_length:
            raise StreamError(
                f"the state was taken with sequences of {state['sequence_length']} tokens, these have "
                f"{self.sequence_length}; build them with the same arguments"
            )
        self.stream.load_state_dict(state["stream"])
        self._fitted_in = int(state["fitted_in"])
        self._pending, self._aside = self._reopened(state["pending"]), self._reopened(state["aside"])

    def _reopened(self, place: list[int] | None) -> _Open | None:
        if place is None:
            return None
        shard, index, epoch, offset = map(int, place)
        item = self.stream.items([(shard, index)])[0]
        opened = self._laid_out(self.stream.reader.document(item), item, epoch)
        if opened is None:
            raise StreamError(f"{item.where} no longer fits; resume with the same data and tokenizers")
        opened.offset = offset
        return opened

    def _sequence(self) -> list[Piece]:
        pieces: list[Piece] = []
        room = self.sequence_length
        while room:
            if self._pending is None:
                self._pending = self._next_document()
            if self._pending is not None and self._pending.cuts is not None and self._aside is None:
                self._pending, self._aside = None, self._pending
                continue
            source = self._pending
            if source is None or source.cuts is not None or len(source.piece) > room:
                source = self._aside
            piece = None if source is None else source.take(room)
            if source is None or piece is None:
                break
            pieces.append(piece)
            room -= len(piece)
            if source.is_done:
                self._pending = None if source is self._pending else self._pending
                self._aside = None if source is self._aside else self._aside
        return pieces

    def _next_document(self) -> _Open | None:
        """The next document that fits, None after the last."""
        while True:
            try:
                item = self.stream.next_item()
            except StopIteration:
                return None
            epoch = self.stream.epoch
            if epoch > self._fitted_in + 1:
                raise StreamError(
                    f"no document of a whole epoch fits {self.sequence_length} tokens; use longer sequences"
                )
            document = self.stream.attempt(item)
            if document is None:
                continue
            try:
                opened = self._laid_out(document, item, epoch)
            except DocumentError as error:
                self.stream.skip(error)
                continue
            if opened is None:
                self.stream.skipped["too long"] += 1
                if self.stream.skipped["too long"] == 1:
                    logger.warning(
                        "left out, as it does not fit %d tokens: %s (said once)", self.sequence_length, item.where
                    )
                continue
            self._fitted_in = epoch
            return opened

    def _laid_out(self, document: Document, item: Item, epoch: int) -> _Open | None:
        spans = self._encoded(document)
        place = (item.shard, item.index, epoch)
        if document.is_ordered or all(name == "text" for name, _ in spans):
            piece = self._piece(spans)
            cuts = places_to_cut(piece, self.ranges)
            return (
                None
                if np.diff(np.flatnonzero(cuts)).max() > self.sequence_length
                else _Open(place=place, piece=piece, cuts=cuts)
            )
        told = dict(spans)
        counts = range(min(2, len(told)), len(told) + 1)
        orders = [
            order
            for order in itertools.chain.from_iterable(itertools.permutations(told, count) for count in counts)
            if self._length(told, order) <= self.sequence_length
        ]
        if not orders:
            return None
        draw = np.random.default_rng([self.stream.seed, *place, 2]).integers(len(orders))
        return _Open(place=place, piece=self._piece([(name, told[name]) for name in orders[int(draw)]]), cuts=None)

    def _encoded(self, document: Document) -> Spans:
        spans: Spans = []
        for name, raw in document.spans:
            tokenizer = self.tokenizers.get(name)
            if tokenizer is None:
                continue
            found = decode(name, raw, document.where)
            try:
                ids = tokenizer.encode(*found) if isinstance(found, tuple) else tokenizer.encode(found)
            except TokenizerError as error:
                raise DocumentError(f"{document.where}: {error}") from None
            if not len(ids):
                raise DocumentError(f"{document.where}: the {name} is empty")
            spans.append((name, np.asarray(ids, dtype=np.int64)))
        if not spans:
            raise DocumentError(f"{document.where}: has nothing of {', '.join(self.tokenizers)}")
        return spans

    def _piece(self, spans: Spans) -> Piece:
        return lay_out(spans, self.ranges, bos_id=self.bos_id, eos_id=self.eos_id, grids=self._grids)

    def _length(self, told: Mapping[str, np.ndarray], order: Sequence[str]) -> int:
        return 2 + sum(len(told[name]) + (0 if self.ranges[name].begin_id is None else 2) for name in order)

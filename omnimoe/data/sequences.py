"""Packed training sequences of interleaved documents, endless and resumable.

Documents that hold a picture or a clip are never cut: a span torn in two is neither readable nor a thing to learn. Only
running text is cut, and it fills what is left of a sequence where the next document does not fit, so there is no
padding as long as the corpus has running text. A cut text goes on in a later sequence, as a segment without ``<bos>``.

All randomness is drawn from ``(seed, epoch)``, so the state is a few integers and resuming is exact.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from torch import Tensor

from omnimoe.data.corpus import MODALITIES, Corpus
from omnimoe.data.documents import (
    DocumentBuilder,
    Piece,
    SequenceError,
    check_sizes,
    collate,
    default_ranges,
    tellable,
)
from omnimoe.data.evaluation import evaluation_batches
from omnimoe.data.templates import Teller
from omnimoe.modalities.vocabulary import TokenRange
from omnimoe.tokenizers.base import Tokenizer

__all__ = ["PackedSequences", "SequenceError", "default_ranges", "evaluation_batches"]


class PackedSequences:
    """Endless batches of packed documents; an iterator of dictionaries of tensors.

    Each row of the corpus is told in a random order of two or three of its modalities: text then picture, speech then
    text, and so on over all permutations. A batch holds

    - ``input_ids (B, T)`` int64;
    - ``labels (B, T)`` int64: ``input_ids``, with -100 on padding, on the first token of each segment and on what a
      template does not teach; they are not shifted, the model shifts;
    - ``modality_ids (B, T)`` int64: index into ``ranges``; markers count as text;
    - ``segment_ids (B, T)`` int64: 0, 1, ... along a row, -1 on padding;
    - ``position_ids (B, T, 3)`` int64, or ``(B, T)`` with ``axes=1``; they start at 0 in each segment, and
      :mod:`omnimoe.data.documents` defines the axes.

    Args:
        corpus: the corpus.
        ranges: modality to its range of the vocabulary, as :func:`default_ranges` makes them.
        sequence_length: T.
        batch_size: B, of this process.
        split: ``"train"``, ``"val"``, ``"test"`` or ``"drawing"``.
        seed: of order and permutations.
        modalities: modalities to use.
        languages: languages of the captions; None for all, empty for those that the corpus says, see
            :func:`omnimoe.data.documents.rows_to_tell`.
        text_share: share of tokens that running text should have, 0 to 1; gaps are filled with it beyond that.
        axes: 3 or 1 position axes.
        rank: number of this process; processes take disjoint rows.
        world_size: number of processes.
        templates: template to weight, see :mod:`omnimoe.data.templates`; where the one drawn cannot tell a row, another
            is. None tells all rows as above.
        text_tokenizer: of the corpus, for the words of templates; None for the shipped one.

    Raises:
        SequenceError: if an argument is out of range or nothing fits.
        RegistryError: if a template is unknown.

    Example:
        >>> corpus = Corpus.load("p")
        >>> batches = PackedSequences(corpus, default_ranges(corpus), sequence_length=256, batch_size=2)
        >>> next(batches)["input_ids"].shape
        torch.Size([2, 256])
    """

    def __init__(
        self,
        corpus: Corpus,
        ranges: Mapping[str, TokenRange],
        *,
        sequence_length: int,
        batch_size: int,
        split: str = "train",
        seed: int = 0,
        modalities: Sequence[str] = MODALITIES,
        languages: Sequence[str] | None = (),
        text_share: float = 0.3,
        axes: int = 3,
        rank: int = 0,
        world_size: int = 1,
        templates: Mapping[str, float] | None = None,
        text_tokenizer: Tokenizer | None = None,
    ) -> None:
        check_sizes(sequence_length, batch_size, axes)
        if not 0 <= text_share <= 1:
            raise SequenceError(f"text_share must lie in 0..1, got {text_share!r}")
        if not 0 <= rank < world_size:
            raise SequenceError(f"rank must lie in 0..world_size-1, got rank {rank} of {world_size}")
        self.builder = DocumentBuilder(corpus, ranges, modalities)
        self.corpus, self.sequence_length, self.batch_size, self.axes = corpus, sequence_length, batch_size, axes
        self.split, self.seed, self.text_share, self.rank, self.world_size = split, seed, text_share, rank, world_size
        self._rows, self._orders = tellable(self.builder, split, languages, sequence_length)
        self._templates = None if templates is None else dict(templates)
        self._told, self._text_tokenizer = self._rows[self._rows < len(corpus)], text_tokenizer
        self._view = (0, *self._tellers(corpus))
        self._rows, self._orders = self._rows[rank::world_size], self._orders[rank::world_size]
        texts = (
            corpus.documents["text"][corpus.select_documents(split)] if "text" in modalities else np.zeros(0, np.int32)
        )
        self._texts = texts[rank::world_size]
        if not len(self._texts):
            self.text_share = 0.0
        if not len(self._rows):
            if not len(self._texts):
                raise SequenceError(
                    f"split {split!r} has nothing of {', '.join(modalities)} "
                    f"that fits {sequence_length} tokens for rank {rank}"
                )
            self.text_share = 1.0
        self._cursor = {
            "row_epoch": 0,
            "row": 0,
            "text_epoch": 0,
            "text": 0,
            "offset": 0,
            "text_tokens": 0,
            "tokens": 0,
        }
        self._drawn: dict[str, tuple[int, np.ndarray, np.ndarray]] = {}

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        return self

    def __next__(self) -> dict[str, Tensor]:
        return collate(
            [self._sequence() for _ in range(self.batch_size)], self.builder, self.sequence_length, self.axes
        )

    @property
    def epoch(self) -> float:
        """Passes over the rows (running text, if there are none), with the fraction of the current one."""
        kind, items = ("row", self._rows) if len(self._rows) else ("text", self._texts)
        return self._cursor[f"{kind}_epoch"] + self._cursor[kind] / len(items)

    def state_dict(self) -> dict[str, Any]:
        """Where the iteration is: plain integers and strings."""
        return {"cursor": dict(self._cursor), "identity": self._identity()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on exactly after the batch that preceded :meth:`state_dict`.

        Raises:
            SequenceError: if the state was taken with another corpus, seed, split, length, share or rank.
        """
        if (
            not isinstance(state, dict)
            or set(state) != {"cursor", "identity"}
            or set(state["cursor"]) != set(self._cursor)
        ):
            raise SequenceError("this is no state of PackedSequences; pass what state_dict returned")
        own = self._identity()
        changed = {
            key: (state["identity"].get(key), value)
            for key, value in own.items()
            if state["identity"].get(key) != value
        }
        if changed:
            told = ", ".join(f"{key} was {old!r} and is {new!r}" for key, (old, new) in changed.items())
            raise SequenceError(f"the state belongs to another iteration: {told}; build it with the same arguments")
        self._cursor = {key: int(value) for key, value in state["cursor"].items()}

    def _identity(self) -> dict[str, Any]:
        return {
            "corpus": self.corpus.meta["rows_sha256"],
            "split": self.split,
            "seed": self.seed,
            "rank": self.rank,
            "world_size": self.world_size,
            "sequence_length": self.sequence_length,
            "text_share": self.text_share,
            "modalities": list(self.builder.modalities),
            "rows": len(self._rows),
            "texts": len(self._texts),
            # Left out where there are none, so that states from before templates still load.
            **({} if self._templates is None else {"templates": self._templates}),
            **({"versions": len(self.corpus.versions)} if self.corpus.versions else {}),
        }

    def _tellers(self, corpus: Corpus) -> tuple[DocumentBuilder, Teller | None]:
        builder = DocumentBuilder(corpus, self.builder.ranges, self.builder.modalities)
        if self._templates is None:
            return builder, None
        longest, tokenizer = self.sequence_length, self._text_tokenizer
        teller = Teller(builder, self._told, self._templates, seed=self.seed, longest=longest, tokenizer=tokenizer)
        return builder, teller

    def _of_epoch(self, epoch: int) -> tuple[DocumentBuilder, Teller | None]:
        """What tells rows in a pass: each one of the train split takes the next version of the corpus."""
        number = epoch % (1 + len(self.corpus.versions)) if self.split == "train" else 0
        if self._view[0] != number:
            self._view = (number, *self._tellers(self.corpus.version(number)))
        return self._view[1:]

    def _sequence(self) -> list[Piece]:
        pieces: list[Piece] = []
        room = self.sequence_length
        while room:
            cursor = self._cursor
            wants_text = cursor["text_tokens"] < self.text_share * (cursor["tokens"] + 1) or not len(self._rows)
            piece = None if wants_text else self._next_document(room)
            if piece is None:
                piece = self._next_text(room)
            if piece is None:
                break
            cursor["tokens"] += len(piece)
            pieces.append(piece)
            room -= len(piece)
        return pieces

    def _next_document(self, room: int) -> Piece | None:
        return self._next_in_order(room) if self._templates is None else self._next_by_template(room)

    def _next_by_template(self, room: int) -> Piece | None:
        for _ in range(len(self._rows)):
            epoch, permutation, _ = self._epoch("row", len(self._rows))
            item = int(permutation[self._cursor["row"]])
            row = int(self._rows[item])
            # Interleaved documents tell themselves.
            own = row >= len(self.corpus)
            builder, teller = self._of_epoch(epoch)
            piece = builder.piece(row, self._orders[item][0]) if own or teller is None else teller.piece(row, epoch)
            if piece is not None and len(piece) > room:
                return None
            self._advance("row", len(self._rows), epoch)
            if piece is not None:
                return piece
        raise SequenceError(
            f"none of the templates {', '.join(self._templates or ())} can tell a row of split {self.split!r} in "
            f"{self.sequence_length} tokens; use longer sequences, or add 'tell'"
        )

    def _next_in_order(self, room: int) -> Piece | None:
        epoch, permutation, draws = self._epoch("row", len(self._rows))
        at = self._cursor["row"]
        item = int(permutation[at])
        orders = self._orders[item]
        order = orders[int(draws[at] * len(orders))]
        row = int(self._rows[item])
        builder, _ = self._of_epoch(epoch)
        if builder.length(row, order) > room:
            return None
        self._advance("row", len(self._rows), epoch)
        return builder.piece(row, order)

    def _next_text(self, room: int) -> Piece | None:
        if not len(self._texts):
            return None
        epoch, permutation, _ = self._epoch("text", len(self._texts))
        text = int(self._texts[permutation[self._cursor["text"]]])
        piece = self.builder.running_text(text, self._cursor["offset"], room)
        self._cursor["offset"] += len(piece)
        if self._cursor["offset"] == len(self.corpus.texts[text]) + 2:
            self._cursor["offset"] = 0
            self._advance("text", len(self._texts), epoch)
        self._cursor["text_tokens"] += len(piece)
        return piece

    def _epoch(self, kind: str, count: int) -> tuple[int, np.ndarray, np.ndarray]:
        epoch = self._cursor[f"{kind}_epoch"]
        if kind not in self._drawn or self._drawn[kind][0] != epoch:
            generator = np.random.default_rng([self.seed, epoch, 0 if kind == "row" else 1])
            self._drawn[kind] = (epoch, generator.permutation(count), generator.random(count))
        return self._drawn[kind]

    def _advance(self, kind: str, count: int, epoch: int) -> None:
        self._cursor[kind] += 1
        if self._cursor[kind] == count:
            self._cursor[kind] = 0
            self._cursor[f"{kind}_epoch"] = epoch + 1

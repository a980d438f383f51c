"""A stream of documents: shuffled, shared out over processes and loader workers, and resumed exactly.

A share of the shards belongs to each process and each of its workers, another one each epoch; where there are fewer
shards than takers, the items of each shard are dealt out to them in turn. Items go through a shuffle buffer, which
holds them unread. What the buffer holds is saved as pairs of shard and index and read anew on resuming, so a state is
small, and so is memory: one shard is open at a time.
"""

from __future__ import annotations

import collections
import logging
from collections.abc import Iterator
from typing import Any, Self

import numpy as np
from torch.utils.data import IterableDataset, get_worker_info

from omnimoe.data.readers.base import Document, DocumentError, Item, Reader

logger = logging.getLogger(__name__)

ON_ERROR = ("raise", "skip")


class StreamError(ValueError):
    """Arguments out of range, a state of another stream, or a stream without a single document of use."""


class DocumentStream(IterableDataset[Document]):
    """Endless documents of a reader.

    The order follows from seed, epoch, and number and count of takers (``world_size`` times loader workers) alone. For
    exact resumption in a loader with workers use ``torchdata.stateful_dataloader.StatefulDataLoader``, which asks every
    worker for :meth:`state_dict`.

    Args:
        reader: where documents come from, see :func:`omnimoe.data.readers.open_reader`.
        seed: of the order.
        shuffle_buffer: items to draw from; 1 keeps the order inside a shard.
        on_error: ``"raise"``, or ``"skip"`` to leave out items that are no documents, counting them in
            :attr:`skipped`.
        rank: number of this process.
        world_size: number of processes.
        split: documents of this split alone; those that name none count as ``train``. None for all.
        epochs: passes over the data; None for no end.

    Raises:
        StreamError: if an argument is out of range.
    """

    def __init__(
        self,
        reader: Reader,
        *,
        seed: int = 0,
        shuffle_buffer: int = 1000,
        on_error: str = "raise",
        rank: int = 0,
        world_size: int = 1,
        split: str | None = None,
        epochs: int | None = None,
    ) -> None:
        if isinstance(shuffle_buffer, bool) or not isinstance(shuffle_buffer, int) or shuffle_buffer < 1:
            raise StreamError(f"shuffle_buffer must be a positive integer, got {shuffle_buffer!r}")
        if on_error not in ON_ERROR:
            raise StreamError(f"on_error must be {' or '.join(ON_ERROR)}, got {on_error!r}")
        if not 0 <= rank < world_size:
            raise StreamError(f"rank must lie in 0..world_size-1, got rank {rank} of {world_size}")
        if epochs is not None and epochs < 1:
            raise StreamError(f"epochs must be at least 1, or None for no end, got {epochs}")
        self.reader, self.seed, self.shuffle_buffer, self.on_error = reader, seed, shuffle_buffer, on_error
        self.rank, self.world_size, self.split, self.epochs = rank, world_size, split, epochs
        self.epoch = 0
        self.skipped: collections.Counter[str] = collections.Counter()
        self._at, self._index = 0, 0
        self._buffer: list[Item] = []
        self._used = 0
        self._random: np.random.Generator | None = None
        self._open: Iterator[Item] | None = None
        self._shards: list[int] | None = None

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Document:
        """The next document, its files still unread.

        Raises:
            DocumentError: if an item is no document and ``on_error`` is ``"raise"``.
            StreamError: if a whole epoch has none.
        """
        while True:
            item = self.next_item()
            document = self.attempt(item)
            if document is not None:
                return document

    def attempt(self, item: Item) -> Document | None:
        """The document of an item, None if it belongs to another split or, with ``on_error="skip"``, is none."""
        try:
            document = self.reader.document(item)
        except DocumentError as error:
            self.skip(error)
            return None
        if self.split is not None and document.fields.get("split", "train") != self.split:
            return None
        self._used += 1
        return document

    def skip(self, error: DocumentError) -> None:
        """Counts a document that cannot be used, or raises its error, as ``on_error`` says."""
        if self.on_error == "raise":
            raise error
        self.skipped["unreadable"] += 1
        # The first ones by name; a broken source would fill the log.
        if self.skipped["unreadable"] <= 5:
            logger.warning("left out: %s", error)

    def next_item(self) -> Item:
        """The next item in shuffled order, unread.

        Raises:
            StopIteration: after the last epoch.
            StreamError: if an epoch gave no document of use.
        """
        while True:
            if self.epochs is not None and self.epoch >= self.epochs:
                raise StopIteration
            if self._random is None:
                self._random = np.random.default_rng([self.seed, self.epoch, *self._taker(), 1])
            while len(self._buffer) < self.shuffle_buffer and (item := self._read()) is not None:
                self._buffer.append(item)
            if self._buffer:
                last = len(self._buffer) - 1
                chosen = int(self._random.integers(last + 1)) if last else 0
                self._buffer[chosen], self._buffer[last] = self._buffer[last], self._buffer[chosen]
                return self._buffer.pop()
            if not self._used and self.epochs is None:
                taker, takers = self._taker()
                told = f" of split {self.split!r}" if self.split else ""
                raise StreamError(
                    f"a whole epoch gave no document{told} for taker {taker} of {takers} "
                    f"({self.skipped['unreadable']} unreadable); use fewer processes and workers, or check the data"
                )
            self.epoch += 1
            self._at = self._index = self._used = 0
            self._random = self._open = self._shards = None

    def items(self, places: list[tuple[int, int]]) -> list[Item]:
        """Items by shard and index, in the order asked for; each shard is gone through once.

        Raises:
            StreamError: if the source has no such item any more.
        """
        found: dict[tuple[int, int], Item] = {}
        wanted: dict[int, set[int]] = {}
        for shard, index in places:
            wanted.setdefault(shard, set()).add(index)
        for shard, indices in wanted.items():
            for item in self.reader.read(shard, min(indices)):
                if item.index in indices:
                    found[shard, item.index] = item
                    if len(indices) == sum(place[0] == shard for place in found):
                        break
        missing = [place for place in places if place not in found]
        if missing:
            raise StreamError(f"the data have no item {missing[0][1]} in shard {missing[0][0]} any more")
        return [found[place] for place in places]

    def state_dict(self) -> dict[str, Any]:
        """Where the stream is: plain integers, strings and lists."""
        return {
            "epoch": self.epoch,
            "at": self._at,
            "index": self._index,
            "used": self._used,
            "buffer": [[item.shard, item.index] for item in self._buffer],
            "random": None if self._random is None else self._random.bit_generator.state,
            "skipped": dict(self.skipped),
            "identity": self._identity(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on exactly where :meth:`state_dict` was taken.

        Raises:
            StreamError: if the state was taken with other data, seed, buffer, split, process or count of workers.
        """
        if not isinstance(state, dict) or set(state) != set(self.state_dict()):
            raise StreamError("this is no state of DocumentStream; pass what state_dict returned")
        was, now = state["identity"], self._identity()
        changed = [f"{key} was {was.get(key)!r} and is {now[key]!r}" for key in now if was.get(key) != now[key]]
        if changed:
            raise StreamError(
                f"the state belongs to another stream: {', '.join(changed)}; build it with the same arguments"
            )
        self.epoch, self._at, self._index, self._used = (int(state[key]) for key in ("epoch", "at", "index", "used"))
        self.skipped = collections.Counter(state["skipped"])
        self._open = self._random = self._shards = None
        if state["random"] is not None:
            self._random = np.random.default_rng()
            self._random.bit_generator.state = state["random"]
        self._buffer = self.items([(int(shard), int(index)) for shard, index in state["buffer"]])

    def _identity(self) -> dict[str, Any]:
        taker, takers = self._taker()
        return {
            "data": self.reader.identity,
            "seed": self.seed,
            "shuffle_buffer": self.shuffle_buffer,
            "split": self.split,
            "taker": taker,
            "takers": takers,
        }

    def _taker(self) -> tuple[int, int]:
        worker = get_worker_info()
        if worker is None:
            return self.rank, self.world_size
        return self.rank * worker.num_workers + worker.id, self.world_size * worker.num_workers

    def _read(self) -> Item | None:
        """The next item of this taker's share, in the order of the epoch's shards."""
        taker, takers = self._taker()
        by_shard = self.reader.num_shards >= takers
        if self._shards is None:
            shards = np.random.default_rng([self.seed, self.epoch, 0]).permutation(self.reader.num_shards)
            self._shards = (shards[taker::takers] if by_shard else shards).tolist()
        while self._at < len(self._shards):
            shard = self._shards[self._at]
            if self._open is None:
                self._open = self.reader.read(shard, self._index)
            item = next(self._open, None)
            if item is None:
                self._at, self._index, self._open = self._at + 1, 0, None
                continue
            self._index = item.index + 1
            if by_shard or item.index % takers == taker:
                return item
        return None

"""The arrays of a tokenized corpus: sequences of different lengths, interleaved documents, varied versions."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

PARTS = ("text", "image", "audio")
"""Kinds of spans of an interleaved document, numbered as they are stored."""


class CorpusError(ValueError):
    """A corpus that is missing, damaged, or has no rows of the kind asked for."""


@dataclass(frozen=True, kw_only=True)
class Ragged:
    """Sequences of different lengths end to end: ``values (total,)`` and ``offsets (n + 1,)``."""

    values: np.ndarray
    offsets: np.ndarray

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, index: int) -> np.ndarray:
        return self.values[self.offsets[index] : self.offsets[index + 1]]

    @property
    def lengths(self) -> np.ndarray:
        """``(n,)`` int64."""
        return np.diff(self.offsets)


@dataclass(frozen=True, kw_only=True)
class Version:
    """Tokens of varied pictures and clips, see :mod:`omnimoe.data.variation`, in the place of those they were made of.

    Args:
        images: ``(n, 64)`` local ids.
        clips: local ids, none longer than what it was made of.
    """

    images: np.ndarray
    clips: Ragged


@dataclass(frozen=True, kw_only=True)
class Interleaved:
    """Documents whose spans have an order: texts with pictures and clips in their places.

    Args:
        kinds: a number into :data:`PARTS` for each span.
        items: index of each span into the corpus' texts, images or clips.
        splits: ``(n,)`` number of each document's split.
    """

    kinds: Ragged
    items: Ragged
    splits: np.ndarray

    def __len__(self) -> int:
        return len(self.splits)


def read_versions(arrays: dict[str, np.ndarray]) -> tuple[Version, ...]:
    """The versions that a file of tokens holds."""
    found: list[Version] = []
    while f"image_{len(found) + 1}_values" in arrays:
        number = len(found) + 1
        images = arrays[f"image_{number}_values"].astype(np.int64)
        found.append(Version(images=images, clips=read_ragged(arrays, f"speech_{number}")))
    return tuple(found)


def read_interleaved(arrays: dict[str, np.ndarray]) -> Interleaved | None:
    """The documents whose spans have an order, if a file of tokens holds any."""
    if "interleaved_kind" not in arrays:
        return None
    offsets = np.concatenate([[0], np.cumsum(arrays["interleaved_lengths"], dtype=np.int64)])
    return Interleaved(
        kinds=Ragged(values=arrays["interleaved_kind"], offsets=offsets),
        items=Ragged(values=arrays["interleaved_item"], offsets=offsets),
        splits=arrays["interleaved_split"],
    )


def read_ragged(arrays: dict[str, np.ndarray], name: str) -> Ragged:
    """Sequences of one name in a file of tokens.

    Raises:
        CorpusError: if their lengths do not add up.
    """
    offsets = np.concatenate([[0], np.cumsum(arrays[f"{name}_lengths"], dtype=np.int64)])
    values = arrays[f"{name}_values"].astype(np.int64)
    if offsets[-1] != len(values):
        raise CorpusError(
            f"{name} has {len(values)} ids, its lengths add to {offsets[-1]}; "
            "write the corpus anew with tokenize_corpus"
        )
    return Ragged(values=values, offsets=offsets)

"""What a reader is: numbered shards of numbered items, and the document that an item holds.

An item is as it lies in the source, unread and undecoded, so a shuffle buffer of a thousand is small, and where one
lies is two integers, so a stream can be resumed by them. Only the document that is used next is parsed and decoded.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, UnidentifiedImageError


class DocumentError(ValueError):
    """An item that is no document, or a file of it that cannot be read. The message starts with where it lies."""


@dataclass(frozen=True, kw_only=True)
class Item:
    """One item of a source.

    Args:
        shard: its shard.
        index: its number in the shard, from 0.
        where: file and line, or what else finds it, for messages.
        content: what its reader makes a document of.
    """

    shard: int
    index: int
    where: str
    content: Any


@dataclass(frozen=True, kw_only=True)
class RawFile:
    """A picture, clip or video in a file that was not decoded yet.

    Args:
        name: for messages.
        path: where it lies, or None.
        data: its bytes, where they were read already.
    """

    name: str
    path: Path | None = None
    data: bytes | None = None

    def open(self) -> Any:
        """A binary stream.

        Raises:
            OSError: if there is no such file.
        """
        if self.data is not None:
            return io.BytesIO(self.data)
        if self.path is None:
            raise FileNotFoundError(f"{self.name} has neither bytes nor a path")
        return self.path.open("rb")


@dataclass(frozen=True, kw_only=True)
class Document:
    """Spans of text, pictures, speech and video.

    Args:
        spans: modality and raw input: a string; a :class:`RawFile`, a PIL image or an array for a picture; a
            :class:`RawFile` or ``(samples, rate)`` for speech; a :class:`RawFile` for video.
        where: for messages.
        is_ordered: whether the spans are a text with pictures and clips in their places. Else they are the columns of a
            row, which may be told in any order.
        fields: what else the source says: ``split``, ``lang``, ``key``, ``topic``.
    """

    spans: tuple[tuple[str, Any], ...]
    where: str
    is_ordered: bool = False
    fields: dict[str, str]

    def decoded(self) -> list[tuple[str, Any]]:
        """The spans as tokenizers take them: strings, PIL images, ``(samples (n,) float32, rate)``, and the file of a
        video, which its tokenizer reads frame by frame.

        Raises:
            DocumentError: if a file is missing, is not a picture, or is not sound.
            ImportError: if sound has to be read and soundfile is not installed.
        """
        return [(modality, decode(modality, raw, self.where)) for modality, raw in self.spans]


class Reader:
    """Base of all readers. Items of a shard come in a fixed order.

    Attributes:
        num_shards: number of shards, at least one.
        identity: a string that differs for other data, to refuse a state of another stream.
    """

    num_shards: int
    identity: str

    def read(self, shard: int, start: int = 0) -> Iterator[Item]:
        """The items of a shard from number ``start`` on; skipping does not read what is skipped."""
        raise NotImplementedError(f"{type(self).__name__} does not define read")

    def document(self, item: Item) -> Document:
        """The document of an item.

        Raises:
            DocumentError: if the item is none.
        """
        raise NotImplementedError(f"{type(self).__name__} does not define document")


def decode(modality: str, raw: Any, where: str) -> Any:
    """Raw input of a span as tokenizers take it; see :meth:`Document.decoded`."""
    if modality == "text":
        if not isinstance(raw, str):
            raise DocumentError(f"{where}: text must be a string, not {type(raw).__name__}")
        return check_characters(raw, "the text", where)
    if not isinstance(raw, RawFile):
        return raw
    return {"image": _picture, "speech": _sound, "video": _video}[modality](raw, where)


def check_characters(text: str, what: str, where: str) -> str:
    """The text itself, unless a half of a pair of surrogates is in it, which JSON can write and UTF-8 cannot.

    Raises:
        DocumentError: with the place of the half.
    """
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise DocumentError(f"{where}: {what} has a lone surrogate at {error.start}, which is no character") from None
    return text


def _picture(raw: RawFile, where: str) -> Image.Image:
    try:
        with raw.open() as file:
            picture = Image.open(file)
            picture.load()
    except FileNotFoundError:
        raise DocumentError(f"{where}: there is no picture {raw.name}") from None
    except UnidentifiedImageError:
        raise DocumentError(f"{where}: {raw.name} is not a picture in a format that Pillow knows") from None
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise DocumentError(f"{where}: the picture {raw.name} cannot be read: {error}") from None
    return picture


def _sound(raw: RawFile, where: str) -> tuple[np.ndarray, int]:
    try:
        import soundfile
    except ImportError:
        raise ImportError(
            "soundfile is not installed and sound files are read with it: pip install 'omnimoe[stream]'"
        ) from None
    try:
        with raw.open() as file:
            samples, rate = soundfile.read(file, dtype="float32", always_2d=True)
    except FileNotFoundError:
        raise DocumentError(f"{where}: there is no sound file {raw.name}") from None
    except (OSError, soundfile.LibsndfileError) as error:
        raise DocumentError(f"{where}: {raw.name} is not sound that libsndfile reads: {error}") from None
    if not len(samples):
        raise DocumentError(f"{where}: the sound file {raw.name} is empty")
    return samples.mean(axis=1), int(rate)


def _video(raw: RawFile, where: str) -> Path | io.BytesIO:
    if raw.path is not None and not raw.path.is_file():
        raise DocumentError(f"{where}: there is no video {raw.name}")
    return raw.path if raw.path is not None else io.BytesIO(raw.data or b"")

"""Pictures, clips and rows as a builder collects them, and the folder they are written to."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from omnimoe.data.pictures import SIDE, fingerprint, scaled
from omnimoe.data.speech import MAX_SAMPLES, MIN_SAMPLES

COLUMNS = ("source", "text", "lang", "image", "audio", "key", "style", "license")


class CorpusStore:
    """What a corpus will hold. Equal clips, and pictures that are equal at 64 pixels, are kept once.

    Whatever the size, equality and likeness are judged at 64 pixels, so that rows and splits are the same for each.

    Args:
        side: width and height of the pictures in pixels.
        longest: samples that a clip may have.
    """

    def __init__(self, side: int = SIDE, longest: int = MAX_SAMPLES) -> None:
        self.side, self.longest = side, longest
        self.pictures: list[np.ndarray] = []
        self.fingerprints: list[bytes] = []
        self.clips: list[np.ndarray] = []
        self.rows: list[dict[str, Any]] = []
        self._picture_index: dict[bytes, int] = {}
        self._clip_index: dict[bytes, int] = {}

    def picture(self, pixels: np.ndarray) -> int:
        """Files a picture, ``(side, side, 3)`` uint8, and gives its index."""
        small = scaled(pixels, SIDE)
        digest = hashlib.sha1(small.tobytes()).digest()
        if digest not in self._picture_index:
            self._picture_index[digest] = len(self.pictures)
            self.pictures.append(pixels)
            self.fingerprints.append(fingerprint(small))
        return self._picture_index[digest]

    def clip(self, samples: np.ndarray) -> int:
        """Files a clip, ``(n,)`` int16 at 16 kHz, and gives its index; -1 for one under 0.1 seconds or too long."""
        if not MIN_SAMPLES <= len(samples) <= self.longest:
            return -1
        digest = hashlib.sha1(samples.tobytes()).digest()
        if digest not in self._clip_index:
            self._clip_index[digest] = len(self.clips)
            self.clips.append(samples)
        return self._clip_index[digest]

    def row(self, **fields: Any) -> None:
        """Adds a row: the columns of :data:`COLUMNS`, ``image`` and ``audio`` -1 where left out, and any others."""
        row = {"image": -1, "audio": -1, **fields}
        self.rows.append({**{column: row[column] for column in COLUMNS}, **row})

    def write(self, folder: Path, documents: Iterable[dict[str, Any]]) -> None:
        """Writes the arrays, ``rows.jsonl`` and ``text.jsonl`` into a folder."""
        empty = np.zeros((0, self.side, self.side, 3), np.uint8)
        np.save(folder / "images.npy", np.stack(self.pictures) if self.pictures else empty)
        np.save(folder / "audio.npy", np.concatenate(self.clips) if self.clips else np.zeros(0, np.int16))
        np.save(folder / "audio_offsets.npy", np.cumsum([0, *map(len, self.clips)], dtype=np.int64))
        write_lines(folder / "rows.jsonl", self.rows)
        write_lines(folder / "text.jsonl", documents)


@contextlib.contextmanager
def new_folder(out: str | os.PathLike[str]) -> Iterator[Path]:
    """A working folder that becomes ``out`` when the block ends well, and is removed otherwise.

    Raises:
        ValueError: if ``out`` exists and is not an empty folder.
    """
    out = Path(out).expanduser()
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out} exists and is not an empty folder; choose another one or remove it first")
    out.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(dir=out.parent, prefix=f".{out.name}-"))
    try:
        yield work
        work.chmod(0o755)
        if out.is_dir():
            out.rmdir()
        work.rename(out)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def write_lines(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Writes one JSON object a line."""
    with path.open("w", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")

"""The pictures and clips behind a token corpus, read from the folder it was made from."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import numpy as np

from omnimoe.data.corpus import Corpus, CorpusError


class RawCorpus:
    """Raw pictures and clips by the rows of a token corpus. Arrays stay on disk until they are read.

    Args:
        folder: as ``build_corpus`` writes it: ``rows.jsonl``, ``images.npy``, ``audio.npy``, ``audio_offsets.npy``.
        corpus: the token corpus that was made from it.

    Raises:
        CorpusError: if the folder lacks a file, or is another corpus than the token corpus was made from.
    """

    def __init__(self, folder: str | os.PathLike[str], corpus: Corpus) -> None:
        folder = Path(folder).expanduser()
        missing = [
            name
            for name in ("rows.jsonl", "images.npy", "audio.npy", "audio_offsets.npy")
            if not (folder / name).is_file()
        ]
        if missing:
            raise CorpusError(
                f"{folder} is not a built corpus: {', '.join(missing)} missing; make one with omnimoe data build"
            )
        self.folder = folder
        languages = set(corpus.meta["languages"])
        with (folder / "rows.jsonl").open(encoding="utf-8") as file:
            rows = (json.loads(line) for line in file)
            self._rows: list[dict[str, Any]] = [row for row in rows if row["lang"] in languages]
        # the same sum over the same rows as tokenize_corpus takes, so row i here is row i there
        contents = "\n".join(f"{row['lang']}\t{row['text']}\t{row['split']}" for row in self._rows)
        if hashlib.sha256(contents.encode()).hexdigest() != corpus.meta["rows_sha256"]:
            raise CorpusError(
                f"{folder} is not what corpus {corpus.name!r} was made from: its rows, captions or splits differ; "
                "evaluate with --data set to that folder, or build it with the same version"
            )
        self._images = np.load(folder / "images.npy", mmap_mode="r")
        self._audio = np.load(folder / "audio.npy", mmap_mode="r")
        self._offsets = np.load(folder / "audio_offsets.npy")

    def text(self, index: int) -> str:
        """The caption of a row."""
        return str(self._rows[index]["text"])

    def picture(self, index: int) -> np.ndarray | None:
        """``(H, W, 3)`` uint8 of a row, or None where it has none."""
        number = self._rows[index]["image"]
        return None if number < 0 else np.array(self._images[number])

    def clip(self, index: int) -> np.ndarray | None:
        """``(n,)`` float32 in [-1, 1] at 16 kHz, or None where the row has none."""
        number = self._rows[index]["audio"]
        if number < 0:
            return None
        return np.asarray(self._audio[self._offsets[number] : self._offsets[number + 1]], np.float32) / 32768

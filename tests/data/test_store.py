"""The store of a builder: equal things once, indices, the folder."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from omnimoe.data.store import COLUMNS, CorpusStore

FIELDS = {"source": "s", "text": "t", "lang": "en", "key": "t", "style": "", "license": "x"}


def test_equal_things_are_kept_once() -> None:
    store = CorpusStore(128)
    rng = np.random.default_rng(0)
    pictures = rng.integers(0, 255, (2, 128, 128, 3)).astype(np.uint8)
    clips = rng.integers(-9, 9, (2, 2_000)).astype(np.int16)
    assert [store.picture(p) for p in (*pictures, pictures[0])] == [0, 1, 0]
    assert [store.clip(c) for c in (*clips, clips[1])] == [0, 1, 1]
    assert store.clip(clips[0][:1_000]) == store.clip(np.zeros(200_000, np.int16)) == -1


def test_the_folder(tmp_path: Path) -> None:
    store = CorpusStore()
    store.row(**FIELDS, image=store.picture(np.zeros((64, 64, 3), np.uint8)), topic="animals")
    store.write(tmp_path, [{"text": "ä"}])
    (line,) = (tmp_path / "rows.jsonl").read_text().splitlines()
    assert list(json.loads(line)) == [*COLUMNS, "topic"]
    assert json.loads(line)["audio"] == -1
    assert np.load(tmp_path / "images.npy").shape == (1, 64, 64, 3)
    assert np.load(tmp_path / "audio_offsets.npy").tolist() == [0]
    assert "ä" in (tmp_path / "text.jsonl").read_text()
    with pytest.raises(KeyError):
        store.row(text="no source")

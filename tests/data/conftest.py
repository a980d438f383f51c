"""A folder as a user would have it: pictures, captions and clips of the shipped corpus, as files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from omnimoe.data import Corpus
from omnimoe.tokenizers.base import load_tokenizer

ROWS = 24


@pytest.fixture(scope="session")
def own_rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``metadata.jsonl`` with 24 rows of text, picture and sound; every file is decoded from the shipped corpus."""
    soundfile = pytest.importorskip("soundfile")
    folder = tmp_path_factory.mktemp("own")
    corpus = Corpus.load("p")
    text, picture, speech = (load_tokenizer(name) for name in ("text", "picture", "speech"))
    chosen: dict[int, int] = {}
    for index in corpus.select("train", sources=("emoji",), having=("image", "speech")):
        chosen.setdefault(int(corpus.rows["group"][index]), int(index))
    lines = []
    for number, index in enumerate(list(chosen.values())[:ROWS]):
        row = corpus[index]
        Image.fromarray(picture.decode(row.image)).save(folder / f"{number:03}.png")
        soundfile.write(folder / f"{number:03}.wav", speech.decode(row.speech), 16_000)
        names = {"image": f"{number:03}.png", "audio": f"{number:03}.wav"}
        lines.append({"text": text.decode(row.text), **names, "split": "train", "lang": "en"})
    (folder / "metadata.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return folder

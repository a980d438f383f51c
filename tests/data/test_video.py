"""Films from a folder to sequences, through a model and back: frames follow each other in time, in the same place."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from omnimoe import Tokens, generate
from omnimoe.data import build_own, default_ranges
from omnimoe.data.readers import DocumentError, open_reader
from omnimoe.data.stream import DocumentStream
from omnimoe.data.streaming import StreamedSequences
from omnimoe.layers import Rope
from omnimoe.spans import span_positions
from omnimoe.tokenizers import load_tokenizer
from tests.narrow import CONFIG, eager_model
from tests.tokenizers.adapted import PICTURES

FRAMES = 3


@pytest.fixture(scope="module")
def films(tmp_path_factory) -> Path:
    """Two captions, each with a film of three drawings, half a second each: one by name, one as the row's file."""
    folder = tmp_path_factory.mktemp("films")
    drawings = [Image.open(path).convert("RGB") for path in PICTURES]
    rows = []
    for number in range(2):
        first, *rest = drawings[FRAMES * number : FRAMES * (number + 1)]
        name = f"{number}.webp"
        first.save(folder / name, save_all=True, append_images=rest, duration=500, lossless=True)
        rows.append({"text": f"three drawings, from number {FRAMES * number} on", "video": name})
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer("video")


@pytest.fixture(scope="module")
def sequences(films, tokenizer) -> StreamedSequences:
    stream = DocumentStream(open_reader(films), shuffle_buffer=1)
    return StreamedSequences(stream, tokenizers={"video": tokenizer}, sequence_length=256, batch_size=1)


def test_a_film_is_a_span_of_its_frames(films, tokenizer, sequences):
    held = sequences.ranges["video"]
    assert list(sequences.ranges) == ["text", "image", "speech", "video"]
    assert held == default_ranges(modalities=("text", "image", "speech", "video"))["video"]
    wanted = {tuple(tokenizer.encode(films / f"{number}.webp").tolist()) for number in range(2)}
    found = set()
    for _ in range(4):
        batch = next(sequences)
        ids = batch["input_ids"][0]
        assert {0, 3} <= set(batch["modality_ids"][0].tolist())
        for start in (ids == held.begin_id).nonzero().flatten().tolist():
            end = start + 1 + FRAMES * 64
            assert ids[end] == held.end_id
            found.add(tuple((ids[start + 1 : end] - held.start).tolist()))
            time, row, column = (batch["position_ids"][0, start + 1 : end] - (start + 1)).unbind(-1)
            cells = torch.arange(FRAMES * 64)
            assert time.equal(cells)
            assert row.equal(cells % 64 // 8)
            assert column.equal(cells % 8)
    assert found == wanted


def test_positions_read_off_the_ids_are_those_of_the_sequences(sequences, video_config):
    batch = next(sequences)
    inside = batch["segment_ids"][0] == 0
    ids = batch["input_ids"][:, inside]
    assert span_positions(video_config, ids, {"image": (8, 8), "video": (8, 8)}).equal(batch["position_ids"][:, inside])


@pytest.fixture(scope="module")
def video_config(sequences):
    held = sequences.ranges["video"]
    video = Tokens.Config(
        name="video", vocab_size=held.size, begin_id=held.begin_id, end_id=held.end_id, frame_size=held.frame_size
    )
    rope = Rope.Config(sections=(2, 3, 3))
    return CONFIG.replace(modalities=(*CONFIG.modalities, video), attention=CONFIG.attention.replace(rope=rope))


def test_a_model_learns_from_films_and_makes_them(sequences, video_config, tokenizer, films, tmp_path):
    model = eager_model(video_config)
    batch = {name: value for name, value in next(sequences).items() if name != "segment_ids"}
    out = model(**batch)
    assert torch.isfinite(out.losses["video"]).all()
    out.loss.backward()
    (made,) = generate(model, {"text": "drawings"}, "video", max_new_tokens=130, seed=0)
    assert made.raw.shape[1:] == (64, 64, 3)
    assert len(made.ids) == 64 * len(made.raw)  # whole frames alone, though the end of a span is likely everywhere
    assert Image.open(made.save(tmp_path / "made.gif")).size == (64, 64)
    (told,) = generate(model, {"video": films / "0.webp"}, "text", max_new_tokens=4, seed=0)
    assert isinstance(told.raw, str)


def test_an_opened_file_is_a_film_too(films, tokenizer):
    with (films / "0.webp").open("rb") as file:
        assert tokenizer.encode(file).equal(tokenizer.encode(films / "0.webp"))


def test_what_is_no_film_is_said(films, tokenizer, tmp_path):
    (tmp_path / "metadata.jsonl").write_text('{"text": "a", "video": "gone.mp4"}\n', encoding="utf-8")
    reader = open_reader(tmp_path)
    with pytest.raises(DocumentError, match=r"line 1: there is no video .*gone\.mp4"):
        reader.document(next(reader.read(0))).decoded()
    with pytest.raises(DocumentError, match="a built corpus holds no video"):
        build_own(films, tmp_path / "built")
    assert np.shape(tokenizer.grid) == (2,)

"""Sequences from a stream: the batches of PackedSequences, whole spans, exact resumption also in loader workers."""

from __future__ import annotations

import itertools
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from omnimoe.data import Corpus, PackedSequences, default_ranges
from omnimoe.data.documents import DocumentBuilder
from omnimoe.data.readers import DocumentError, open_reader
from omnimoe.data.stream import DocumentStream, StreamError
from omnimoe.data.streaming import StreamedSequences
from omnimoe.tokenizers.base import load_tokenizer
from omnimoe.tokenizers.text import BOS_ID, EOS_ID

LENGTH = 192


def batches_of(folder: Path, **changes: object) -> StreamedSequences:
    options = {name: changes.pop(name) for name in ("seed", "epochs", "on_error", "shuffle_buffer") if name in changes}
    stream = DocumentStream(open_reader(folder), **{"shuffle_buffer": 8, **options})  # type: ignore[arg-type]
    return StreamedSequences(stream, **{"sequence_length": LENGTH, "batch_size": 2, **changes})  # type: ignore[arg-type]


def segments(batch: dict[str, Tensor]) -> list[dict[str, Tensor]]:
    found = []
    for row in range(len(batch["input_ids"])):
        for number in range(int(batch["segment_ids"][row].max()) + 1):
            at = batch["segment_ids"][row] == number
            found.append({key: value[row][at] for key, value in batch.items()})
    return found


def equal(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(first[key].equal(second[key]) for key in first)


def test_batches_are_those_of_packed_sequences(own_rows: Path) -> None:
    corpus = Corpus.load("p")
    packed = PackedSequences(corpus, default_ranges(corpus), sequence_length=LENGTH, batch_size=2)
    theirs, ours = next(packed), next(batches_of(own_rows))
    assert theirs.keys() == ours.keys()
    for key, value in ours.items():
        assert (value.shape, value.dtype) == (theirs[key].shape, theirs[key].dtype)
    one_axis = next(batches_of(own_rows, axes=1))
    assert one_axis["position_ids"].shape == (2, LENGTH)


def test_documents_are_those_that_a_builder_makes_of_the_same_tokens(own_rows: Path) -> None:
    rows = [json.loads(line) for line in (own_rows / "metadata.jsonl").read_text().splitlines()]
    text, picture = load_tokenizer("text"), load_tokenizer("picture")
    expected = set()
    ranges = default_ranges()
    for row in rows:
        words = text.encode(row["text"]).numpy()
        image = picture.encode(own_rows / row["image"]).numpy() + ranges["image"].start
        expected.add(bytes(np.concatenate([[BOS_ID], words, [3], image, [4, EOS_ID]]).astype(np.int64)))
        expected.add(bytes(np.concatenate([[BOS_ID, 3], image, [4], words, [EOS_ID]]).astype(np.int64)))
    only = {name: ranges[name] for name in ("text", "image")}
    found = list(
        itertools.chain.from_iterable(segments(batch) for batch in batches_of(own_rows, ranges=only, epochs=3))
    )
    assert len(found) == 3 * len(rows)
    made = {bytes(segment["input_ids"].numpy()) for segment in found}
    assert made <= expected
    assert len(made) > len(rows)
    for segment in found:
        labels = segment["labels"].clone()
        assert labels[0] == -100
        assert labels[1:].equal(segment["input_ids"][1:])
        assert segment["position_ids"][:, 0].equal(torch.arange(len(labels)))


def test_spans_and_positions_agree_with_the_document_builder(own_rows: Path) -> None:
    corpus = Corpus.load("p")
    builder = DocumentBuilder(corpus, default_ranges(corpus))
    piece = builder.document(corpus[int(corpus.select("train", having=("image",))[0])], ("image", "text"))
    for segment in segments(next(batches_of(own_rows))):
        for start in (segment["input_ids"] == 3).nonzero().flatten().tolist():
            cells = segment["position_ids"][start + 1 : start + 65] - start
            assert cells.equal(torch.from_numpy(piece.positions[2:66] - 1))


def test_every_order_of_the_modalities_is_told(own_rows: Path) -> None:
    orders = set()
    for batch in batches_of(own_rows, epochs=9):
        for segment in segments(batch):
            numbers = segment["modality_ids"][segment["input_ids"] >= 16].tolist()
            orders.add(tuple(number for number, _ in itertools.groupby(numbers)))
    assert orders == {order for count in (2, 3) for order in itertools.permutations(range(3), count)}


@pytest.mark.parametrize("after", [0, 1, 6, 15])
def test_resuming_is_exact(own_rows: Path, tmp_path: Path, after: int) -> None:
    folder = with_stories(own_rows, tmp_path)
    running = batches_of(folder, seed=5)
    for _ in range(after):
        next(running)
    state = json.loads(json.dumps(running.state_dict()))
    resumed = batches_of(folder, seed=5)
    resumed.load_state_dict(state)
    for _ in range(12):
        assert equal(next(running), next(resumed))


def with_stories(own_rows: Path, tmp_path: Path) -> Path:
    """The rows, and documents too long for one sequence: words and pictures in turn."""
    folder = tmp_path / "stories"
    shutil.copytree(own_rows, folder)
    words = "It was a bright cold day in April, and the clocks were striking. " * 6
    stories = [
        {"spans": [f"{number} {words}", {"image": f"{number:03}.png"}, words, {"image": "005.png"}, " The end."]}
        for number in range(4)
    ]
    (folder / "stories.jsonl").write_text("\n".join(map(json.dumps, stories)))
    return folder


def test_long_documents_are_cut_between_words_only_and_come_whole(own_rows: Path, tmp_path: Path) -> None:
    folder = with_stories(own_rows, tmp_path)
    (folder / "metadata.jsonl").unlink()
    parts = list(itertools.chain.from_iterable(segments(batch) for batch in batches_of(folder, epochs=1)))
    for part in parts:
        ids = part["input_ids"]
        assert (ids == 3).sum() == (ids == 4).sum()
        assert part["position_ids"][0].tolist() == [0, 0, 0]
    text, picture, start = load_tokenizer("text"), load_tokenizer("picture"), default_ranges()["image"].start
    joined = torch.cat([part["input_ids"] for part in parts])
    documents = [
        d[: (d == EOS_ID).nonzero()[0]] for d in joined.tensor_split((joined == BOS_ID).nonzero().flatten())[1:]
    ]
    assert len(documents) == 4
    told = {text.decode(document[document < 2048])[:1]: document for document in documents}
    assert sorted(told) == ["0", "1", "2", "3"]
    image = told["2"][(told["2"] == 3).nonzero()[0] + 1 :][:64] - start
    assert image.equal(picture.encode(folder / "002.png"))


def test_text_fills_what_is_left(own_rows: Path, tmp_path: Path) -> None:
    folder = tmp_path / "filled"
    shutil.copytree(own_rows, folder)
    padded = sum(int((batch["segment_ids"] < 0).sum()) for batch in batches_of(folder, epochs=1))
    lines = [{"text": "In the beginning was the word. " * 40} for _ in range(12)]
    (folder / "more.jsonl").write_text("\n".join(map(json.dumps, lines)))
    batches = list(batches_of(folder, epochs=1, shuffle_buffer=100))
    assert padded > 300
    # Between one text and the next there may be none aside; and the last batches may lack text to fill with.
    assert sum(int((batch["segment_ids"] < 0).sum()) for batch in batches[:-2]) < 60


def test_bad_files_raise_or_are_counted(own_rows: Path, tmp_path: Path) -> None:
    folder = tmp_path / "bad"
    shutil.copytree(own_rows, folder)
    (folder / "003.png").write_text("no picture")
    (folder / "007.wav").unlink()
    (folder / "more.jsonl").write_text('{"text": ""}\n' + json.dumps({"text": "x", "image": ["001.png"] * 3}))
    with pytest.raises(DocumentError, match=r"metadata\.jsonl, line \d+: |more\.jsonl, line 1: the text is empty"):
        list(batches_of(folder, epochs=1))
    batches = batches_of(folder, epochs=1, on_error="skip")
    assert sum(len(segments(batch)) for batch in batches) >= 22
    assert batches.stream.skipped == {"unreadable": 3}


def test_what_never_fits_is_told(own_rows: Path) -> None:
    with pytest.raises(StreamError, match="no document of a whole epoch fits 8 tokens"):
        next(batches_of(own_rows, sequence_length=8))
    only_text = {"text": default_ranges()["text"]}
    assert (next(batches_of(own_rows, sequence_length=8, ranges=only_text))["modality_ids"] == 0).all()


def test_a_state_of_another_length_is_refused(own_rows: Path) -> None:
    state = batches_of(own_rows).state_dict()
    with pytest.raises(StreamError, match="sequences of 192 tokens, these have 256"):
        batches_of(own_rows, sequence_length=256).load_state_dict(state)
    with pytest.raises(StreamError, match="no state of StreamedSequences"):
        batches_of(own_rows).load_state_dict({})


def test_a_stateful_loader_resumes_its_workers(own_rows: Path) -> None:
    stateful = pytest.importorskip("torchdata.stateful_dataloader")

    def make() -> object:
        return stateful.StatefulDataLoader(batches_of(own_rows, seed=2), batch_size=None, num_workers=2)

    running = make()
    iterator = iter(running)
    for _ in range(7):
        next(iterator)
    state = running.state_dict()
    expected = [next(iterator) for _ in range(6)]
    resumed = make()
    resumed.load_state_dict(state)
    for batch, again in zip(expected, iter(resumed), strict=False):
        assert equal(batch, again)

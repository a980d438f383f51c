"""The stream: every document once, shares that do not meet, the same order again, exact resumption, bounded memory."""

from __future__ import annotations

import io
import itertools
import json
import tarfile
import tracemalloc
from pathlib import Path

import pytest
from torch.utils.data import DataLoader

from omnimoe.data.readers import DocumentError, Reader, open_reader
from omnimoe.data.stream import DocumentStream, StreamError


def write_texts(folder: Path, *, shards: int, rows: int, size: int = 0) -> Path:
    """Tar files of numbered texts, each padded to ``size`` bytes."""
    folder.mkdir(exist_ok=True)
    for shard in range(shards):
        with tarfile.open(folder / f"{shard:03}.tar", "w") as tar:
            for row in range(rows):
                data = f"{shard}-{row} ".encode().ljust(size, b"x")
                member = tarfile.TarInfo(f"{row:05}.txt")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    return folder


@pytest.fixture
def reader(tmp_path: Path) -> Reader:
    return open_reader(write_texts(tmp_path / "shards", shards=6, rows=20))


def names(stream: DocumentStream, count: int | None = None) -> list[str]:
    return [document.decoded()[0][1].split()[0] for document in itertools.islice(stream, count)]


ALL = {f"{shard}-{row}" for shard in range(6) for row in range(20)}


def test_an_epoch_gives_every_document_once_in_a_new_order(reader: Reader) -> None:
    stream = DocumentStream(reader, shuffle_buffer=30, epochs=2)
    first, second = names(stream, 120), names(stream, None)
    assert len(first) == len(second) == 120
    assert set(first) == set(second) == ALL
    assert first != second
    assert first != sorted(first)
    # Documents of several shards meet in the buffer.
    assert len({name.split("-")[0] for name in first[:20]}) > 1


def test_the_seed_decides_the_order(reader: Reader) -> None:
    orders = [names(DocumentStream(reader, seed=seed, shuffle_buffer=16), 300) for seed in (0, 0, 1)]
    assert orders[0] == orders[1] != orders[2]


def test_a_buffer_of_one_keeps_the_order_inside_a_shard(reader: Reader) -> None:
    found = names(DocumentStream(reader, shuffle_buffer=1, epochs=1))
    for start in range(0, 120, 20):
        assert [int(name.split("-")[1]) for name in found[start : start + 20]] == list(range(20))


@pytest.mark.parametrize("world_size", [2, 5, 6, 9, 50])
def test_processes_share_an_epoch(reader: Reader, world_size: int) -> None:
    parts = [
        names(DocumentStream(reader, shuffle_buffer=8, epochs=1, rank=rank, world_size=world_size))
        for rank in range(world_size)
    ]
    assert sum(map(len, parts)) == len(ALL)
    assert set().union(*parts) == ALL
    if world_size > 6:  # dealt out in turn, so that nobody is left without
        assert all(parts[: min(world_size, 20)])


@pytest.mark.parametrize("after", [0, 1, 7, 119, 120, 121, 250])
@pytest.mark.parametrize("world_size", [1, 4, 9])
def test_resuming_is_exact(reader: Reader, after: int, world_size: int) -> None:
    def make() -> DocumentStream:
        return DocumentStream(reader, seed=3, shuffle_buffer=16, rank=world_size - 1, world_size=world_size)

    running = make()
    names(running, after)
    state = json.loads(json.dumps(running.state_dict()))
    resumed = make()
    resumed.load_state_dict(state)
    assert names(running, 200) == names(resumed, 200)
    assert running.epoch == resumed.epoch


@pytest.mark.parametrize("workers", [1, 2])
def test_loader_workers_share_an_epoch(reader: Reader, workers: int) -> None:
    stream = DocumentStream(reader, shuffle_buffer=8, epochs=1)
    loader = DataLoader(stream, batch_size=None, num_workers=workers)
    found = [document.decoded()[0][1].split()[0] for document in loader]
    assert len(found) == len(ALL)
    assert set(found) == ALL


def test_a_state_of_another_stream_is_refused(reader: Reader, tmp_path: Path) -> None:
    state = DocumentStream(reader, seed=1).state_dict()
    with pytest.raises(StreamError, match="seed was 1 and is 0"):
        DocumentStream(reader).load_state_dict(state)
    other = open_reader(write_texts(tmp_path / "other", shards=6, rows=40))
    with pytest.raises(StreamError, match="data was"):
        DocumentStream(other, seed=1).load_state_dict(state)
    with pytest.raises(StreamError, match="no state of DocumentStream"):
        DocumentStream(reader).load_state_dict({"epoch": 1})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"shuffle_buffer": 0}, "positive integer, got 0"),
        ({"on_error": "ignore"}, "raise or skip, got 'ignore'"),
        ({"rank": 2, "world_size": 2}, "got rank 2 of 2"),
        ({"epochs": 0}, "at least 1, or None"),
    ],
)
def test_bad_arguments_are_refused(reader: Reader, changes: dict, message: str) -> None:
    with pytest.raises(StreamError, match=message):
        DocumentStream(reader, **changes)


def test_splits(tmp_path: Path) -> None:
    lines = [{"text": f"{i} x", "split": "test" if i % 3 == 0 else "train"} for i in range(30)]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, [*lines, {"text": "30 x"}])))
    reader = open_reader(tmp_path)
    assert len(names(DocumentStream(reader, split="test", epochs=1))) == 10
    assert len(names(DocumentStream(reader, split="train", epochs=1))) == 21
    with pytest.raises(StreamError, match="no document of split 'val'"):
        names(DocumentStream(reader, split="val"), 1)


def test_bad_items_raise_or_are_counted(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "0 x"}\n{oh\n{"text": "1 x"}\n{"text": 7}\n')
    with pytest.raises(DocumentError, match=r"a\.jsonl, line [24]"):
        names(DocumentStream(open_reader(tmp_path), epochs=1))
    stream = DocumentStream(open_reader(tmp_path), epochs=1, on_error="skip")
    assert sorted(names(stream)) == ["0", "1"]
    assert stream.skipped == {"unreadable": 2}
    (tmp_path / "a.jsonl").write_text("{oh\n")
    with pytest.raises(StreamError, match=r"gave no document for taker 0 of 1 \(1 unreadable\)"):
        names(DocumentStream(open_reader(tmp_path), on_error="skip"), 1)


def peak_memory(folder: Path) -> int:
    reader = open_reader(folder)
    stream = DocumentStream(reader, shuffle_buffer=20, epochs=1)
    tracemalloc.start()
    try:
        count = sum(len(document.decoded()) for document in stream)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert count == reader.num_shards * 50
    return peak


def test_memory_does_not_grow_with_the_number_of_shards(tmp_path: Path) -> None:
    few = peak_memory(write_texts(tmp_path / "few", shards=3, rows=50, size=20_000))
    many = peak_memory(write_texts(tmp_path / "many", shards=30, rows=50, size=20_000))
    # Twenty rows of 20 kB; the thirty shards are 30 MB.
    assert few < 3_000_000
    assert many < 1.1 * few

"""All readers give the same documents of the same rows, and tell what is wrong where."""

from __future__ import annotations

import io
import json
import shutil
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from omnimoe.data.readers import DatasetReader, Document, DocumentError, FolderReader, Reader, TarReader, open_reader


def documents(reader: Reader) -> list[Document]:
    return [reader.document(item) for shard in range(reader.num_shards) for item in reader.read(shard)]


def contents(reader: Reader) -> list[dict[str, Any]]:
    """What every document holds, decoded, in a form that compares."""
    found = []
    for document in documents(reader):
        spans = dict(document.decoded())
        samples, rate = spans["speech"]
        pixels = np.asarray(spans["image"].convert("RGB")).tobytes()
        found.append({"text": spans["text"], "pixels": pixels, "samples": samples.tobytes(), "rate": rate})
    return sorted(found, key=lambda row: (row["text"], row["pixels"]))


def rows_of(folder: Path) -> Iterator[dict[str, Any]]:
    for line in (folder / "metadata.jsonl").read_text().splitlines():
        yield json.loads(line)


def add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(data)
    tar.addfile(member, io.BytesIO(data))


def write_shards(folder: Path, out: Path, count: int = 3) -> None:
    for shard in range(count):
        with tarfile.open(out / f"part-{shard:03}.tar", "w") as tar:
            for number, row in list(enumerate(rows_of(folder)))[shard::count]:
                add(tar, f"{number:04}.txt", row["text"].encode())
                add(tar, f"{number:04}.png", (folder / row["image"]).read_bytes())
                add(tar, f"{number:04}.wav", (folder / row["audio"]).read_bytes())
                add(tar, f"{number:04}.json", json.dumps({"lang": "en", "width": 64}).encode())


def test_files_that_belong_together_by_name(own_rows: Path, tmp_path: Path) -> None:
    for row in rows_of(own_rows):
        stem = tmp_path / "train" / Path(row["image"]).stem
        stem.parent.mkdir(exist_ok=True)
        stem.with_suffix(".txt").write_text(row["text"] + "\n")
        shutil.copy(own_rows / row["image"], stem.with_suffix(".png"))
        shutil.copy(own_rows / row["audio"], stem.with_suffix(".wav"))
    reader = open_reader(tmp_path)
    assert isinstance(reader, FolderReader)
    assert contents(reader) == contents(open_reader(own_rows))
    assert {document.fields["split"] for document in documents(reader)} == {"train"}


def test_shards(own_rows: Path, tmp_path: Path) -> None:
    write_shards(own_rows, tmp_path)
    for source in (tmp_path, str(tmp_path / "part-{000..002}.tar"), str(tmp_path / "part-*.tar")):
        reader = open_reader(source)
        assert isinstance(reader, TarReader)
        assert reader.num_shards == 3
        assert contents(reader) == contents(open_reader(own_rows))
    assert [item.index for item in reader.read(1, 5)] == [5, 6, 7]
    assert documents(reader)[0].fields == {"lang": "en"}


def test_shards_that_webdataset_wrote(own_rows: Path, tmp_path: Path) -> None:
    webdataset = pytest.importorskip("webdataset")
    with webdataset.TarWriter(str(tmp_path / "a.tar")) as writer:
        for number, row in enumerate(rows_of(own_rows)):
            png, wav = ((own_rows / row[name]).read_bytes() for name in ("image", "audio"))
            writer.write({"__key__": f"{number:05}", "txt": row["text"], "png": png, "wav": wav})
    reader = open_reader(tmp_path / "a.tar")
    assert contents(reader) == contents(open_reader(own_rows))
    theirs = webdataset.WebDataset(str(tmp_path / "a.tar"), shardshuffle=False)
    names = [item.where.rpartition(", ")[2] for item in reader.read(0)]
    assert names == [row["__key__"] for row in theirs]


@pytest.mark.parametrize("form", ["map", "streaming", "disk", "parquet", "folder of parquet"])
def test_datasets(own_rows: Path, tmp_path: Path, form: str) -> None:
    datasets = pytest.importorskip("datasets")
    rows = list(rows_of(own_rows))
    columns = {
        "text": [row["text"] for row in rows],
        "photo": [{"bytes": (own_rows / row["image"]).read_bytes(), "path": row["image"]} for row in rows],
        "audio": [{"bytes": (own_rows / row["audio"]).read_bytes(), "path": row["audio"]} for row in rows],
    }
    dataset = datasets.Dataset.from_dict(columns)
    # Cast and not made so, for making a column of sound needs torchcodec.
    dataset = dataset.cast_column("photo", datasets.Image()).cast_column("audio", datasets.Audio())
    source: Any = dataset
    if form == "streaming":
        source = dataset.to_iterable_dataset(num_shards=3)
    elif form == "disk":
        dataset.save_to_disk(tmp_path / "disk")
        source = tmp_path / "disk"
    elif "parquet" in form:
        (tmp_path / "tables").mkdir()
        source = tmp_path / "tables" / "train-0.parquet"
        dataset.to_parquet(source)
        source = source.parent if "folder" in form else source
    reader = open_reader(source)
    assert isinstance(reader, DatasetReader)
    assert contents(reader) == contents(open_reader(own_rows))
    assert [item.index for item in reader.read(0, 3)][:2] == [3, 4]
    if form == "streaming":
        assert reader.num_shards == 3


def test_a_hub_name_that_cannot_be_loaded_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("datasets")
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(DocumentError, match="dataset nobody/nothing cannot be loaded"):
        open_reader("hub:nobody/nothing")


def test_interleaved_documents_keep_their_order(own_rows: Path, tmp_path: Path) -> None:
    for name in ("000.png", "001.png", "000.wav"):
        shutil.copy(own_rows / name, tmp_path / name)
    spans = ["one ", {"image": "000.png"}, {"text": " two "}, {"image": "001.png"}, {"audio": "000.wav"}]
    (tmp_path / "stories.jsonl").write_text(json.dumps({"spans": spans, "split": "validation"}))
    (document,) = documents(open_reader(tmp_path))
    assert document.is_ordered
    assert [modality for modality, _ in document.spans] == ["text", "image", "text", "image", "speech"]
    assert document.fields == {"split": "val"}
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        add(tar, "s.json", json.dumps({"spans": ["a ", {"image": "0.png"}, " b ", {"image": "1.png"}]}).encode())
        for number in (0, 1):
            add(tar, f"s.{number}.png", (tmp_path / f"00{number}.png").read_bytes())
    (packed,) = documents(open_reader(tmp_path / "a.tar"))
    assert packed.is_ordered
    assert np.array_equal(packed.decoded()[3][1], document.decoded()[3][1])


def test_imagefolder_metadata_and_other_combinations(own_rows: Path, tmp_path: Path) -> None:
    shutil.copy(own_rows / "000.png", tmp_path / "a.png")
    shutil.copy(own_rows / "001.png", tmp_path / "b.png")
    shutil.copy(own_rows / "000.wav", tmp_path / "a.wav")
    lines = [
        {"file_name": "a.png", "text": "a lion"},
        {"file_name": "a.wav", "transcription": "a lion"},
        {"image": "a.png"},
        {"text": "words alone"},
        {"image": ["a.png", "b.png"], "text": "two"},
        {"title": "named otherwise", "text": None},
    ]
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    reader = FolderReader(tmp_path)
    items = list(reader.read(0))
    found = [[modality for modality, _ in reader.document(item).spans] for item in items[:5]]
    assert found == [["text", "image"], ["text", "speech"], ["image"], ["text"], ["text", "image", "image"]]
    assert reader.document(items[4]).is_ordered
    with pytest.raises(
        DocumentError, match=r"metadata\.jsonl, line 6: has no text, image, audio or video; its fields are title"
    ):
        reader.document(items[5])
    named = FolderReader(tmp_path, columns={"text": "title"})
    assert named.document(items[5]).decoded() == [("text", "named otherwise")]
    with pytest.raises(DocumentError, match="line 1: has no field 'title'"):
        named.document(items[0])


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{not json", "line 1: is not JSON"),
        ("[1]", "line 1: a row is an object with fields, not list"),
        ('{"text": 3}', "line 1: text must be a string, not int"),
        ('{"image": 3}', "line 1: image must be a file name or bytes, not int"),
        ('{"image": "no.png"}', r"line 1: there is no picture .*no\.png"),
        ('{"image": "text.txt"}', r"line 1: .*text\.txt is not a picture"),
        ('{"image": "half.png"}', r"line 1: the picture .*half\.png cannot be read"),
        ('{"audio": "text.txt"}', r"line 1: .*text\.txt is not sound"),
        ('{"audio": "no.wav"}', r"line 1: there is no sound file .*no\.wav"),
        ('{"audio": "empty.wav"}', r"line 1: the sound file .*empty\.wav is empty"),
        ('{"file_name": "text.txt3"}', "line 1: text.txt3 is neither a picture nor sound"),
        ('{"image": "../../secret.png"}', r"line 1: \.\./\.\./secret\.png lies outside"),
        ('{"image": "/etc/passwd"}', "line 1: /etc/passwd lies outside"),
        ('{"spans": []}', "line 1: spans is an empty list"),
        ('{"spans": [{"image": "a.png", "text": "x"}]}', "line 1: a span is a string or an object with one of"),
        ('{"text": "x", "split": "exam"}', "line 1: has split 'exam'; known are train"),
    ],
)
def test_bad_rows_are_told_with_file_and_line(own_rows: Path, tmp_path: Path, line: str, message: str) -> None:
    soundfile = pytest.importorskip("soundfile")
    (tmp_path / "metadata.jsonl").write_text(line)
    (tmp_path / "text.txt").write_text("no picture")
    (tmp_path / "half.png").write_bytes((own_rows / "000.png").read_bytes()[:400])
    soundfile.write(tmp_path / "empty.wav", np.zeros(0, np.float32), 16_000)
    reader = FolderReader(tmp_path)
    (item,) = reader.read(0)
    with pytest.raises(DocumentError, match=message):
        reader.document(item).decoded()


def test_a_decompression_bomb_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Image.new("L", (400, 400)).save(tmp_path / "a.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    (document,) = documents(FolderReader(tmp_path))
    with pytest.raises(DocumentError, match=r"a\.png cannot be read: .*exceeds limit"):
        document.decoded()


def test_sources_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(DocumentError, match="does not exist; pass a folder"):
        open_reader(tmp_path / "no")
    with pytest.raises(DocumentError, match="holds no rows"):
        open_reader(tmp_path)
    with pytest.raises(DocumentError, match="there is no shard"):
        open_reader(str(tmp_path / "a-{00..02}.tar"))
    (tmp_path / "bad.tar").write_bytes(b"no tar" * 1000)
    with pytest.raises(DocumentError, match=r"bad\.tar cannot be read as a tar file"):
        list(open_reader(tmp_path / "bad.tar").read(0))
    pytest.importorskip("datasets")
    with pytest.raises(DocumentError, match="is a dict, not a Dataset"):
        open_reader({"train": []})


def test_a_long_file_is_many_shards_and_reads_from_the_middle(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("".join(f'{{"text": "row {i} é"}}\n' for i in range(2_500)))
    reader = open_reader(tmp_path / "a.jsonl")
    assert reader.num_shards == 3
    texts = [document.decoded()[0][1] for document in documents(reader)]
    assert texts == [f"row {i} é" for i in range(2_500)]
    item = next(reader.read(2, 321))
    assert reader.document(item).decoded() == [("text", "row 2321 é")]
    assert item.where.endswith("line 2322")

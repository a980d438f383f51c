"""Data of one's own: rows, texts and interleaved documents in one corpus, splits without leaks, batches, a training."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from omnimoe.data import Corpus, CorpusError, PackedSequences, build_own, default_ranges, evaluation_batches
from omnimoe.data.documents import DocumentBuilder, fitting_parts, rows_to_tell
from omnimoe.data.readers import DocumentError
from omnimoe.tokenizers.base import load_tokenizer
from omnimoe.tokenizers.text import BOS_ID, EOS_ID


@pytest.fixture(scope="module")
def folder(own_rows: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The rows without splits; eight long stories; five texts."""
    folder = tmp_path_factory.mktemp("mixed") / "mixed"
    shutil.copytree(own_rows, folder)
    lines = [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]
    for line in lines:
        del line["split"]
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    words = "Once upon a time there was a thing and it looked like this. " * 8
    stories = [
        {"spans": [f"{n}. {words}", {"image": f"{n:03}.png"}, f"Then {n}. {words}", {"audio": f"{n:03}.wav"}, "End."]}
        for n in range(8)
    ]
    (folder / "stories.jsonl").write_text("\n".join(map(json.dumps, stories)))
    texts = [{"text": f"{n} words of their own. " * 30} for n in range(5)]
    (folder / "texts.jsonl").write_text("\n".join(map(json.dumps, texts)))
    return folder


@pytest.fixture(scope="module")
def built(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_own(folder, tmp_path_factory.mktemp("built") / "corpus")


@pytest.fixture(scope="module")
def corpus(built: Path) -> Corpus:
    return Corpus.load(built)


def lines_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_the_folder_is_that_of_a_public_set(built: Path, corpus: Corpus) -> None:
    rows, texts, stories = (lines_of(built / f"{name}.jsonl") for name in ("rows", "text", "interleaved"))
    assert (len(rows), len(texts), len(stories)) == (24, 5, 8)
    assert all(row["image"] >= 0 and row["audio"] >= 0 for row in rows)
    assert np.load(built / "images.npy").shape[1:] == (64, 64, 3)
    assert len(corpus) == 24
    assert corpus.meta["name"] == "corpus"
    assert corpus.interleaved is not None
    assert len(corpus.interleaved) == 8
    assert "not stated" in (built / "LICENSES.md").read_text()


def test_what_shares_a_picture_shares_a_split(built: Path) -> None:
    rows, stories = lines_of(built / "rows.jsonl"), lines_of(built / "interleaved.jsonl")
    split_of = {row["image"]: row["split"] for row in rows if row["split"] != "drawing"}
    for story in stories:
        for span in story["spans"]:
            if span.get("image") in split_of:
                assert split_of[span["image"]] == story["split"]
    splits = {row["split"] for row in (*rows, *stories)}
    assert {"train", "val"} <= splits


def test_pictures_come_in_at_128(folder: Path, tmp_path: Path) -> None:
    built = build_own(folder, tmp_path / "large", image_size=128)
    assert np.load(built / "images.npy").shape[1:] == (128, 128, 3)


def test_interleaved_documents_come_whole_and_in_order(built: Path, corpus: Corpus) -> None:
    story = lines_of(built / "interleaved.jsonl")[0]
    spans = corpus.interleaved_spans(0)
    assert [name for name, _ in spans] == ["text", "image", "text", "speech", "text"]
    assert load_tokenizer("text").decode(spans[0][1]) == story["spans"][0]["text"]
    with pytest.raises(CorpusError, match="there is no interleaved document 8; the corpus has 8"):
        corpus.interleaved_spans(8)
    builder = DocumentBuilder(corpus, default_ranges(corpus))
    whole = builder.interleaved(0)
    assert (whole.ids[0], whole.ids[-1]) == (BOS_ID, EOS_ID)
    for segment in parts_of(corpus, "train"):
        assert (segment == 3).sum() == (segment == 4).sum()
    joined = torch.cat(parts_of(corpus, "train")).tolist()
    # Parts of one document may lie apart in an epoch, but evaluation tells them in order.
    stories = np.flatnonzero(corpus.interleaved.splits == 0).tolist()  # type: ignore[union-attr]
    text = " ".join(map(str, joined))
    assert stories
    for index in stories:
        assert " ".join(map(str, builder.interleaved(index).ids.tolist())) in text


def parts_of(corpus: Corpus, split: str) -> list[torch.Tensor]:
    found = []
    batches = evaluation_batches(corpus, default_ranges(corpus), sequence_length=192, batch_size=2, split=split)
    for batch in batches:
        for row in range(len(batch["input_ids"])):
            numbers = batch["segment_ids"][row]
            found += [batch["input_ids"][row][numbers == n] for n in range(int(numbers.max()) + 1)]
    return found


@pytest.mark.parametrize("templates", [None, {"name_it": 1.0, "tell": 1.0}])
def test_an_epoch_of_packed_sequences_has_every_part(corpus: Corpus, templates: dict | None) -> None:
    def make() -> PackedSequences:
        return PackedSequences(
            corpus, default_ranges(corpus), sequence_length=192, batch_size=1, text_share=0.0, templates=templates
        )

    batches = make()
    parts = len(batches._rows)
    assert parts > len(corpus.select("train")) + 8
    segments = 0
    while batches.epoch < 1:
        segments += int(next(batches)["segment_ids"].max()) + 1
    assert segments >= parts
    resumed = make()
    resumed.load_state_dict(json.loads(json.dumps(batches.state_dict())))
    one, two = next(batches), next(resumed)
    assert all(one[key].equal(two[key]) for key in one)


def test_parts() -> None:
    places = np.array([True, True, False, False, True, True, True])
    assert fitting_parts(places, 3) == [(0, 1), (1, 4), (4, 6)]
    assert fitting_parts(places, 6) == [(0, 6)]
    assert fitting_parts(places, 2) is None


def test_splits_that_the_data_name_are_kept(own_rows: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    source = tmp_path / "named"
    shutil.copytree(own_rows, source)
    lines = lines_of(source / "metadata.jsonl")
    for number, line in enumerate(lines):
        line["split"] = "validation" if number % 4 == 0 else "train"
    lines[1]["text"] = lines[0]["text"]
    (source / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    corpus = Corpus.load(build_own(source, tmp_path / "out"))
    assert [corpus[i].split for i in range(6)] == ["val", "train", "train", "train", "val", "train"]
    assert "the splits that the data name overlap" in caplog.text


def test_bad_files_stop_it_or_are_left_out(own_rows: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    source = tmp_path / "bad"
    shutil.copytree(own_rows, source)
    (source / "002.png").write_text("no picture")
    with pytest.raises(DocumentError, match=r"metadata\.jsonl, line 3: .*002\.png is not a picture"):
        build_own(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    built = build_own(source, tmp_path / "out", on_error="skip")
    assert len(lines_of(built / "rows.jsonl")) == 23
    assert "1 documents could not be read" in caplog.text
    with pytest.raises(ValueError, match="not an empty folder"):
        build_own(source, tmp_path / "out")
    with pytest.raises(ValueError, match="on_error must be raise or skip, got 'never'"):
        build_own(source, tmp_path / "other", on_error="never")
    with pytest.raises(ValueError, match="image_size must be 64 or 128, got 32"):
        build_own(source, tmp_path / "other", image_size=32)


LONE = "a \ud800 half"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ({"text": LONE}, "the text has a lone surrogate at 2"),
        ({"text": LONE, "image": "001.png"}, "the text has a lone surrogate at 2"),
        ({"spans": ["A thing", {"image": "001.png"}, LONE]}, "the text has a lone surrogate at 2"),
        ({"text": "a thing", "image": f"{LONE}.png"}, "the file name of image has a lone surrogate at 2"),
        ({"text": "a thing", "key": LONE}, "key has a lone surrogate at 2"),
    ],
)
def test_half_a_character_is_told_with_file_and_line(
    own_rows: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, line: dict, message: str
) -> None:
    source = tmp_path / "bad"
    shutil.copytree(own_rows, source)
    (source / "more.jsonl").write_text(json.dumps({"text": "words"}) + "\n" + json.dumps(line) + "\n")
    with pytest.raises(DocumentError, match=rf"more\.jsonl, line 2: {message}"):
        build_own(source, tmp_path / "out")
    built = build_own(source, tmp_path / "out", on_error="skip")
    assert len(lines_of(built / "rows.jsonl")) == 24
    assert "1 documents could not be read" in caplog.text


def test_a_file_name_of_other_bytes_is_no_matter(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    try:
        Path(os.fsdecode(os.fsencode(tmp_path / "in") + b"/caf\xe9.txt")).write_text("coffee")
    except OSError:
        pytest.skip("this file system takes names in UTF-8 alone")
    assert len(lines_of(build_own(tmp_path / "in", tmp_path / "out") / "text.jsonl")) == 1


def test_a_folder_of_ones_own_loads_and_trains(own_rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from omnimoe import load
    from omnimoe.train import Training, TrainSettings

    monkeypatch.setenv("OMNIMOE_CACHE", str(tmp_path / "cache"))
    source = tmp_path / "data"
    shutil.copytree(own_rows, source)
    settings = TrainSettings(
        data=str(source), steps=1, batch_size=1, sequence_length=128, evaluate_batches=0, warmup=0, precision="fp32"
    )
    history = Training(load("dense_nano", seed=0), settings, show_progress=False).run()
    assert history.tokens == 128
    assert not any(path.suffix == ".npy" for path in source.iterdir())
    made = list((tmp_path / "cache" / "own").iterdir())
    assert len(Corpus.load(source)) == 24
    assert list((tmp_path / "cache" / "own").iterdir()) == made
    (source / "more.jsonl").write_text('{"text": "a thing", "image": "000.png"}')
    assert len(Corpus.load(source)) == 25
    (tmp_path / "nothing").mkdir()
    with pytest.raises(CorpusError, match="nothing is neither a corpus nor data to make one of"):
        Corpus.load(tmp_path / "nothing")


def test_rows_are_told_in_the_languages_that_the_corpus_says(corpus: Corpus) -> None:
    shipped = Corpus.load("p")
    assert shipped.meta.get("told", "en") == "en"
    english = shipped.select("val", having=())
    assert np.array_equal(rows_to_tell(shipped, "val", ()), english)
    assert len(rows_to_tell(shipped, "val", None)) > len(english)
    assert np.array_equal(rows_to_tell(shipped, "val", ("de",)), shipped.select("val", languages=("de",)))
    # As in set S: German with a voice is told, German without is not.
    german = shipped.select("val", languages=("de",))
    audio = shipped.rows["audio"].copy()
    audio[german[:3]] = 0
    spoken = replace(shipped, rows={**shipped.rows, "audio": audio}, meta={**shipped.meta, "told": "spoken"})
    assert sorted(rows_to_tell(spoken, "val", ())) == sorted([*english, *german[:3]])
    assert corpus.meta["told"] == "all"
    other = replace(corpus, meta={**corpus.meta, "languages": ["xx"]})
    assert len(rows_to_tell(other, "train", ())) == len(corpus.select("train", having=()))

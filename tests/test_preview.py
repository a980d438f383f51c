"""Previews: the page, the sheet and the clips, of tokens, of a built folder and of one's own data."""

from __future__ import annotations

import json
import re
import wave
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from omnimoe.cli import main
from omnimoe.data import Corpus, CorpusError
from omnimoe.preview import preview_corpus
from omnimoe.tokenizers.base import load_tokenizer
from omnimoe.tokenizers.picture import LargePictureTokenizer


def seconds(path: Path) -> float:
    with wave.open(str(path)) as file:
        assert (file.getframerate(), file.getnchannels(), file.getsampwidth()) == (16_000, 1, 2)
        return file.getnframes() / file.getframerate()


def test_the_shipped_tokens(tmp_path: Path) -> None:
    page = preview_corpus("p", tmp_path, count=4)
    text = page.read_text(encoding="utf-8")
    assert text.count("<audio") == 4
    assert "Decoded from tokens." in text
    assert len(list((tmp_path / "clips").iterdir())) == 4
    assert all(0.1 < seconds(path) < 8 for path in (tmp_path / "clips").iterdir())
    sheet = np.asarray(Image.open(tmp_path / "sheet.png"))
    # Four pictures of 128 screen pixels; not one of them blank.
    assert sheet.shape[1] > 4 * 128
    assert (sheet.std(axis=(0, 2)) > 20).mean() > 0.5


def test_a_built_folder_shows_the_original_beside_it(tmp_path: Path) -> None:
    built = tmp_path / "built"
    built.mkdir()
    corpus = Corpus.load("p")
    picture, speech = load_tokenizer("picture"), load_tokenizer("speech")
    row = corpus[int(corpus.select("train", sources=("emoji",), having=("image", "speech"))[0])]
    clip = (speech.decode(row.speech) * 32767).astype(np.int16)
    fields = {"text": "Пальма", "lang": "bg", "image": 0, "audio": 0, "key": "palm", "split": "test", "source": "x"}
    (built / "rows.jsonl").write_text(json.dumps(fields))
    np.save(built / "images.npy", np.repeat(np.repeat(picture.decode(row.image)[None], 2, 1), 2, 2))
    np.save(built / "audio.npy", clip)
    np.save(built / "audio_offsets.npy", np.array([0, len(clip)]))
    text = preview_corpus(built, tmp_path / "out", split="test").read_text(encoding="utf-8")
    assert "Left the original" in text
    assert "Пальма [bg] (from tokens)" in text
    names = sorted(path.name for path in (tmp_path / "out" / "clips").iterdir())
    assert names == ["000-decoded.wav", "000.wav"]
    assert seconds(tmp_path / "out" / "clips" / "000.wav") == pytest.approx(len(clip) / 16_000)
    # Two pictures of 128 pixels side by side.
    assert Image.open(tmp_path / "out" / "sheet.png").width >= 2 * 128
    with pytest.raises(CorpusError, match="split 'val' of .* has no rows to show; choose test$"):
        preview_corpus(built, tmp_path / "none", split="val")


def test_the_command_builds_and_shows_ones_own_data(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("OMNIMOE_CACHE", str(tmp_path / "cache"))
    source = tmp_path / "photos"
    source.mkdir()
    for number, colour in enumerate(("red", "green", "blue", "yellow")):
        Image.new("RGB", (90, 60), colour).save(source / f"{number}.png")
        (source / f"{number}.txt").write_text(f"a {colour} thing")
    assert main(["data", "build", "--folder", str(source), "--out", str(tmp_path / "built"), "--tokenize"]) == 0
    assert f"--data {tmp_path / 'built'}" in capsys.readouterr().out
    assert (tmp_path / "built" / "tokens" / "tokens.npz").is_file()
    assert main(["data", "info", str(tmp_path / "built"), "--json"]) == 0
    counts = json.loads(capsys.readouterr().out)
    assert sum(split["rows"] for split in counts.values()) == 4
    assert main(["data", "preview", str(source), "--out", str(tmp_path / "page"), "--count", "2"]) == 0
    assert (tmp_path / "page" / "sheet.png").is_file()
    assert not (tmp_path / "page" / "clips").exists()


def test_tokens_of_a_size_that_pictures_have_not_are_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    source = tmp_path / "photos"
    source.mkdir()
    for colour in ("red", "blue"):
        Image.new("RGB", (200, 150), colour).save(source / f"{colour}.png")
        (source / f"{colour}.txt").write_text(f"a {colour} thing")
    large = LargePictureTokenizer(LargePictureTokenizer.Config(hidden_size=40, encoder_blocks=1, decoder_blocks=1))
    large.save_pretrained(tmp_path / "large.safetensors")
    build = ["data", "build", "--folder", str(source), "--image-size", "128"]
    assert main([*build, "--out", str(tmp_path / "a"), "--tokenize"]) == 0
    assert "have 128 x 128 pixels, and the tokenizer 'picture' reads and draws 64 x 64" in caplog.text
    caplog.clear()
    own = ["--tokenizer", f"image=picture_128:{tmp_path / 'large.safetensors'}"]
    assert main([*build, "--out", str(tmp_path / "b"), "--tokenize", *own]) == 0
    assert "reads and draws" not in caplog.text
    assert Corpus.load(tmp_path / "b").images.shape == (2, 256)
    capsys.readouterr()
    for given, told in ((own, "add --tokenize"), (["--tokenize", "--tokenizer", "video=video"], "got 'video'")):
        assert main([*build, "--out", str(tmp_path / "c"), *given]) == 2
        assert told in capsys.readouterr().err
        assert not (tmp_path / "c").exists()


def test_interleaved_documents_alone_are_told_and_shown_in_order(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, built = tmp_path / "stories", tmp_path / "built"
    source.mkdir()
    Image.fromarray(load_tokenizer("picture").decode(Corpus.load("p").images[0])).save(source / "a.png")
    tone = (9_000 * np.sin(np.arange(8_000) / 9)).astype("<i2")
    with wave.open(str(source / "a.wav"), "wb") as file:
        file.setparams((1, 2, 16_000, 0, "NONE", ""))
        file.writeframes(tone.tobytes())
    spans = ["A thing ", {"image": "a.png"}, " & sings: ", {"audio": "a.wav"}]
    lines = [{"spans": spans, "split": "train"}, {"text": "Words alone. " * 100, "split": "test"}]
    (source / "stories.jsonl").write_text("\n".join(map(json.dumps, lines)))
    assert main(["data", "build", "--folder", str(source), "--out", str(built), "--tokenize"]) == 0
    assert main(["data", "info", str(built)]) == 0
    assert "and 1 interleaved documents" in capsys.readouterr().out

    page = tmp_path / "page"
    assert main(["data", "preview", str(built), "--out", str(page)]) == 0
    names = ["01_text.txt", "02_image.png", "03_image-decoded.png", "04_text.txt", "05_speech.wav"]
    assert sorted(path.name for path in (page / "documents").iterdir()) == [
        f"001_{name}" for name in (*names, "06_speech-decoded.wav")
    ]
    text = (page / "index.html").read_text(encoding="utf-8")
    assert re.findall("<img|<audio|A thing|&amp; sings", text) == [
        "A thing", "<img", "<img", "&amp; sings", "<audio", "<audio"
    ]  # fmt: skip
    assert "<table" not in text
    of_tokens = preview_corpus(built / "tokens", tmp_path / "tokens").read_text(encoding="utf-8")
    assert re.findall("<img|<audio|A thing|&amp; sings", of_tokens) == ["A thing", "<img", "&amp; sings", "<audio"]
    texts = preview_corpus(built, tmp_path / "texts", split="test").read_text(encoding="utf-8")
    assert "Words alone. Words" in texts
    assert "…" in texts
    for folder in (built, built / "tokens"):
        with pytest.raises(CorpusError, match="split 'val' of .* has no rows to show; choose train or test$"):
            preview_corpus(folder, tmp_path / "none", split="val")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["build", "--folder", "{}/no", "--out", "{}/o"], "does not exist; pass a folder"),
        (["build", "--folder", "{}", "--out", "{}/o", "--column", "title"], "--column takes text=NAME"),
        (["build", "--set", "Q", "--out", "{}/o"], "unknown corpus 'Q'; known: P, S, D"),
        (["preview", "p", "--out", "{}/o", "--split", "exam"], "unknown split 'exam'"),
        (["preview", "p", "--out", "{}/o", "--count", "0"], "count must be at least 1, got 0"),
        (["preview", "{}/no", "--out", "{}/o"], "no corpus"),
    ],
)
def test_errors_of_the_command(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert main(["data", *(argument.format(tmp_path) for argument in arguments)]) == 2
    assert message in capsys.readouterr().err

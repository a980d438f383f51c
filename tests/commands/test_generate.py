"""``omnimoe generate``: files, numbers, sheets, pages and streams, and one clear error for a wrong call."""

from __future__ import annotations

import argparse
import json
import re

import numpy as np
import pytest
from PIL import Image

from omnimoe.commands import generate as command
from omnimoe.generate import read_wave
from omnimoe.generation import prompts
from omnimoe.hub import list_models
from omnimoe.model import MODELS
from omnimoe.pipelines.bagel import Bagel
from tests.generation.test_media import write_wave
from tests.narrow import PICTURE, SOUND, TRANSFUSION, eager_model, narrow_model, narrow_tokenizers


@pytest.fixture(autouse=True)
def _shipped(monkeypatch):
    """Puts the narrow tokenizers in the place of those that ship."""
    by_name = {"text": "text", "picture": "image", "speech": "speech"}
    monkeypatch.setattr(prompts, "load_tokenizer", lambda name: narrow_tokenizers()[by_name[name]])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    narrow_model().save_pretrained(path)
    return str(path)


def call(*arguments: str) -> int:
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    return command.run(parser.parse_args([str(part) for part in arguments]))


def test_the_command_draws_numbered_pictures(folder, tmp_path, capsys):
    out = tmp_path / "new" / "x.png"
    common = (
        "--model",
        folder,
        "--from",
        "text",
        "a red apple",
        "--to",
        "image",
        "--num",
        "2",
        "--seed",
        "0",
        "--json",
    )
    assert call(*common, "--out", out) == 0
    told = json.loads(capsys.readouterr().out)
    files = [tmp_path / "new" / name for name in ("x_1.png", "x_2.png")]
    assert [sample["file"] for sample in told["samples"]] == [str(file) for file in files]
    assert [sample["num_tokens"] for sample in told["samples"]] == [64, 64]
    pictures = [Image.open(file).convert("RGB") for file in files]
    assert [picture.size for picture in pictures] == [(64, 64)] * 2
    again = tmp_path / "again.png"
    assert call(*common, "--out", again) == 0
    repeated = [(tmp_path / f"again_{i}.png").read_bytes() for i in (1, 2)]
    assert repeated == [file.read_bytes() for file in files]


def test_the_command_reads_pictures_and_sounds(folder, tmp_path, capsys):
    Image.fromarray(PICTURE).save(tmp_path / "a.png")
    write_wave(tmp_path / "a.wav", SOUND, 8_000)
    given = ("--from", "image", tmp_path / "a.png", "--from", "speech", tmp_path / "a.wav")
    assert call("--model", folder, *given, "--to", "text", "--max-new-tokens", "5", "--seed", "1") == 0
    printed = capsys.readouterr().out
    out = tmp_path / "b.wav"
    assert call("--model", folder, *given, "--to", "speech", "--out", out, "--max-new-tokens", "5") == 0
    assert capsys.readouterr().out == f"wrote {out}\n"
    assert len(read_wave(out)[0]) % 640 == 0
    out = tmp_path / "b.txt"
    assert call("--model", folder, *given, "--to", "text", "--max-new-tokens", "5", "--seed", "1", "--out", out) == 0
    assert out.read_text(encoding="utf-8") == printed
    assert capsys.readouterr().out == f"{printed}wrote {out}\n"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"--out": None}, "needs a file to write: --out image.png"),
        ({"--out": "x.wav"}, "must end in .png"),
        ({"--out": "."}, "must end in .png"),
        ({"--num": "0"}, "--num must be at least 1"),
        ({"--to": "smell"}, "no modality 'smell'"),
        ({"--model": "nowhere"}, "neither an existing folder nor an id"),
        ({"--model": "mot_nanoo"}, "mot_nano"),
        ({"--model": "mot_7b"}, "no weights for 'mot_7b'; train it first"),
        ({"--from": ("image", "nowhere.png")}, "no picture at nowhere.png"),
        ({"--from": ("speech", "nowhere.wav")}, "no sound at nowhere.wav"),
        ({"--from": ("speech", __file__)}, "is not a PCM WAV file"),
        ({"--from": ("image", __file__)}, "is not a picture"),
        ({"--from": ("text", "")}, "is empty"),
        ({"--from": ("text", " \t\n ")}, "is empty; leave it out"),
        ({"--from": ("smell", "roses")}, "no modality 'smell'"),
        ({"--from": ("text",)}, "--from text takes an input, got 0; put words"),
        ({"--from": ("text", "a", "red")}, "--from text takes an input, got 2; put words of a text into quotes"),
        ({"--from": ("image,text", "a.png")}, "--from image,text takes 2 inputs, got 1"),
        ({"--prompts": "captions.txt"}, "leave --from out"),
        ({"--from": None, "--prompts": "captions.txt"}, "no file of prompts at captions.txt"),
        ({"--to": "any", "--out": None}, "--to any needs a folder or a page"),
        ({"--to": "any", "--out": "made", "--best-of": "3"}, "are for one modality, not for --to any"),
        ({"--to": "any", "--out": "x.txt"}, "--out x.txt is called as neither; write --out x or --out x.html"),
        ({"--to": "any", "--out": "file"}, "--out file is a file; name a folder"),
        ({"--to": "any", "--out": "made", "--steps": "10"}, "--steps is for what is denoised; .* makes any token by"),
        ({"--steps": "10"}, "--steps is for what is denoised; .* makes image token by token; leave it out"),
        ({"--steps": "0"}, "--steps must be at least 1, got 0"),
        ({"--batch-size": "0"}, "--batch-size must be at least 1, got 0"),
        ({"--max-new-tokens": "0"}, "--max-new-tokens must be at least 1, got 0"),
        ({"--out": "file/x.png"}, "--out file/x.png cannot be written: Not a directory; choose another place"),
        ({"--out": "/proc/x.png"}, "--out /proc/x.png cannot be written: .*; choose another place"),
        ({"--to": "any", "--out": "/proc/made"}, "--out /proc/made cannot be written: "),
        ({"--sheet": "file/x.png"}, "--sheet file/x.png cannot be written: "),
        ({"--sheet": "x.wav"}, "--sheet must end in .png"),
        ({"--to": "text", "--out": None, "--sheet": "x.png"}, "--sheet shows pictures, not text"),
        ({"--guidance": "inf"}, "guidance must be 0 or more and finite, got inf"),
        ({"--temperature": "image=inf"}, "temperature must be 0 or more and finite, got inf"),
        ({"--top-p": "inf"}, r"top_p must be in \(0, 1\], got inf"),
        ({"--min-p": "inf"}, r"min_p must be in \[0, 1\], got inf"),
        ({"--temperature": "image=-1"}, "temperature must be 0 or more and finite, got -1.0"),
        ({"--top-k": "smell=3"}, "top_k names 'smell'; the modalities are text, image, speech"),
        ({"--to": "text", "--out": None, "--guidance": "3"}, "text has no boundary tokens"),
        ({"--tokenizer": "image"}, "--tokenizer takes MODALITY=NAME"),
        ({"--tokenizer": "image=bytes"}, "the tokenizer of 'image' has 272 ids"),
    ],
)
def test_a_wrong_call_is_one_clear_error(folder, tmp_path, monkeypatch, changes, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("")
    usual = {"--model": folder, "--from": ("text", "a"), "--to": "image", "--out": "x.png"}
    arguments = []
    for option, value in {**usual, **changes}.items():
        if value is not None:
            arguments += [option, *(value if isinstance(value, tuple) else (value,))]
    with pytest.raises(ValueError, match=message) as caught:
        call(*arguments)
    assert "\n" not in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["file"], "a refusal leaves nothing behind"


@pytest.mark.parametrize("named", ["a folder", "omni_nano"])
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["--to", "img"], "no modality 'img'; it has text, image, speech"),
        (["--from", "txt", "a"], "no modality 'txt'"),
        (["--out", "/proc/x.png"], "cannot be written"),
        (["--steps", "3"], "--steps is for what is denoised"),
    ],
)
def test_what_can_be_told_before_the_weights_are_read_is(folder, monkeypatch, named, changes, message):
    monkeypatch.setattr(command, "read_model", lambda name, device: pytest.fail("the weights are read"))
    model = folder if named == "a folder" else named
    with pytest.raises(ValueError, match=message):
        call("--model", model, "--to", "image", "--out", "x.png", *changes)


def test_text_may_go_to_a_device(folder):
    common = ("--model", folder, "--from", "text", "a", "--to", "text", "--max-new-tokens", "3")
    assert call(*common, "--out", "/dev/null") == 0


@pytest.mark.parametrize(
    ("to", "given", "message"),
    [
        ("text", ("--steps", "3"), "--steps changes nothing of --to text with bagel; leave it out"),
        ("text", ("--size", "32x32"), "--size changes nothing of --to text with bagel"),
        ("text", ("--guidance", "3"), "--guidance changes nothing of --to text with bagel"),
        ("image", ("--frames", "3", "--out", "x.png"), "--frames is for --to video, not for --to image"),
    ],
)
def test_what_a_published_model_has_no_use_for_is_refused(monkeypatch, to, given, message):
    monkeypatch.setattr("omnimoe.pipelines.find_pipeline", lambda source: (Bagel, source))
    with pytest.raises(ValueError, match=message):
        call("--model", "bagel", "--from", "text", "a", "--to", to, *given)


def test_a_file_of_captions_makes_a_sheet_and_numbered_files(folder, tmp_path, capsys):
    captions = tmp_path / "captions.txt"
    captions.write_text("a red apple\n\na lion\n", encoding="utf-8")
    sheet, out = tmp_path / "sheets" / "sheet.png", tmp_path / "x.png"
    common = ("--model", folder, "--prompts", captions, "--to", "image", "--num", "3", "--seed", "0")
    assert call(*common, "--sheet", sheet, "--out", out, "--batch-size", "4") == 0
    files = [tmp_path / f"x_{prompt}_{number}.png" for prompt in (1, 2) for number in (1, 2, 3)]
    told = [f"wrote {file}" for file in [*files, sheet]]
    assert capsys.readouterr().out.splitlines() == told
    shown = np.asarray(Image.open(sheet).convert("RGB")).astype(int)
    for column, file in enumerate(files[:3]):
        picture = np.asarray(Image.open(file).convert("RGB")).astype(int).repeat(2, 0).repeat(2, 1)
        left = 14 + column * (128 + 4)
        assert np.abs(shown[14 : 14 + 128, left : left + 128] - picture)[1:-1, 1:-1].max() == 0
    below = shown[14 + 128 + 4 : 14 + 128 + 22, 14:120]
    assert below.min() < 100, "the caption is written under the pictures"
    assert call(*common, "--sheet", tmp_path / "again.png") == 0
    assert (tmp_path / "again.png").read_bytes() == sheet.read_bytes()


def test_documents_of_a_jsonl_file(folder, tmp_path, capsys):
    Image.fromarray(PICTURE).save(tmp_path / "a.png")
    write_wave(tmp_path / "a.wav", SOUND, 16_000)
    lines = [{"image": "a.png"}, [["speech", "a.wav"], ["text", "a"]], {}]
    given = tmp_path / "documents.jsonl"
    given.write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    common = ("--model", folder, "--to", "text", "--seed", "0", "--max-new-tokens", "6", "--json")
    assert call(*common, "--prompts", given) == 0
    samples = json.loads(capsys.readouterr().out)["samples"]
    assert [sample["prompt"] for sample in samples] == [1, 2, 3]
    assert call(*common, "--from", "image", tmp_path / "a.png") == 0
    assert json.loads(capsys.readouterr().out)["samples"][0]["text"] == samples[0]["text"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", "\n \n", "holds no prompt"),
        ("a.txt", b"\xff\xfe\x00", "no text file in UTF-8"),
        ("a.jsonl", '{"text": "a"}\n{"text"', "a.jsonl:2 is no JSON"),
        ("a.jsonl", '"a lion"', "a.jsonl:1 is no document"),
        ("a.jsonl", '{"text": 3}', "a.jsonl:1 is no document"),
        ("a.jsonl", '{"speech": "nowhere.wav"}', "a.jsonl:1: no sound at"),
    ],
)
def test_a_wrong_file_of_prompts_is_one_clear_error(folder, tmp_path, name, content, message):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=message):
        call("--model", folder, "--prompts", path, "--to", "text")


def test_interleaved_documents_become_a_folder_and_a_page(folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(command, "read_model", lambda name, device: eager_model())
    out = tmp_path / "made"
    common = ("--model", folder, "--from", "text", "a <b>", "--to", "any", "--num", "2", "--seed", "1")
    assert call(*common, "--out", out, "--max-new-tokens", "200", "--json") == 0
    told = json.loads(capsys.readouterr().out)
    page = (out / "index.html").read_text(encoding="utf-8")
    assert told["page"] == str(out / "index.html")
    files = [sample["file"] for sample in told["samples"]]
    assert sorted(files) == sorted(str(path) for path in out.iterdir() if path.name != "index.html")
    kinds = [sample["modality"] for sample in told["samples"]]
    assert {"text", "image", "speech"} == set(kinds)
    # everything is in the page, in order, and nothing comes from elsewhere
    shown = re.findall(r"<img|<audio|<p class=\"\">", page)
    assert shown == [{"text": '<p class="">', "image": "<img", "speech": "<audio"}[kind] for kind in kinds]
    assert "a &lt;b&gt;" in page
    assert not re.search(r"(src|href)=\"(?!data:)", page)
    single = tmp_path / "one.html"
    assert call(*common, "--out", single, "--max-new-tokens", "200") == 0
    assert single.read_text(encoding="utf-8") == page
    assert f"all in order in {single}" in capsys.readouterr().out


def test_text_is_streamed_to_a_terminal(folder, capsys, monkeypatch):
    common = ("--model", folder, "--from", "text", "a", "--to", "text", "--seed", "3", "--max-new-tokens", "20")
    assert call(*common) == 0
    plain = capsys.readouterr().out
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    written = []
    monkeypatch.setattr("builtins.print", lambda *parts, end="\n", **_: written.append("".join(map(str, parts)) + end))
    assert call(*common) == 0
    assert "".join(written) == plain
    assert len(written) > 2


def test_values_by_modality(folder, tmp_path):
    common = ("--model", folder, "--from", "text", "a", "--to", "image", "--seed", "0")
    for name, options in {
        "one": ("--temperature", "0"),
        "two": ("--temperature", "text=1,image=0"),
        "three": ("--top-k", "image=1", "--min-p", "0.1"),
        "four": ("--guidance", "image=4.5"),
    }.items():
        assert call(*common, *options, "--out", tmp_path / f"{name}.png") == 0
    one, two, three, four = ((tmp_path / f"{name}.png").read_bytes() for name in ("one", "two", "three", "four"))
    assert one == two == three != four


@pytest.mark.parametrize("value", ["much", "image=", "image"])
def test_a_value_that_is_no_number_is_refused(folder, capsys, value):
    with pytest.raises(SystemExit):
        call("--model", folder, "--to", "text", "--temperature", value)
    assert "number, or modality=float" in capsys.readouterr().err


def test_the_best_are_kept_with_their_scores(folder, tmp_path, capsys):
    common = ("--model", folder, "--from", "text", "a", "--to", "image", "--seed", "0", "--json")
    assert call(*common, "--num", "2", "--best-of", "4", "--out", tmp_path / "x.png") == 0
    first, second = (sample["score"] for sample in json.loads(capsys.readouterr().out)["samples"])
    assert second <= first < 0


def test_a_name_of_the_zoo_with_weights_beside_its_card(folder, tmp_path, monkeypatch):
    """As a model that ships: the card names a folder beside the module, and nothing is fetched."""
    import shutil
    import sys
    import types

    from omnimoe.zoo.card import Card

    module = types.ModuleType("zoo_of_the_test")
    module.__file__ = str(tmp_path / "zoo_of_the_test.py")
    module.CARD = Card(family="test", title="a test", paper="", weights={"narrow_shipped": "weights/narrow"})
    monkeypatch.setitem(sys.modules, module.__name__, module)
    shutil.copytree(folder, tmp_path / "weights" / "narrow")

    def narrow_shipped():
        return narrow_model().config

    narrow_shipped.__module__ = module.__name__
    MODELS.register("narrow_shipped")(narrow_shipped)
    try:
        assert "narrow_shipped" in list_models(pretrained=True)
        common = ("--from", "text", "a", "--to", "image", "--seed", "0")
        assert call("--model", "narrow_shipped", *common, "--out", tmp_path / "a.png") == 0
        assert call("--model", folder, *common, "--out", tmp_path / "b.png") == 0
        assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    finally:
        MODELS.remove("narrow_shipped")


def test_a_continuous_picture_is_denoised(tmp_path, monkeypatch):
    monkeypatch.setattr(command, "read_model", lambda name, device: narrow_model(TRANSFUSION))
    monkeypatch.setattr(command, "read_tokenizers", lambda given: {"latent": narrow_tokenizers()["latent"]})
    common = ("--model", "narrow", "--from", "text", "a", "--to", "latent", "--seed", "0", "--guidance", "2")
    for name, steps in (("a", 2), ("b", 2), ("c", 6)):
        assert call(*common, "--steps", steps, "--out", tmp_path / f"{name}.png", "--sheet", tmp_path / "s.png") == 0
    pictures = [(tmp_path / f"{name}.png").read_bytes() for name in "abc"]
    assert pictures[0] == pictures[1] != pictures[2]
    assert Image.open(tmp_path / "a.png").size == (32, 32)
    with pytest.raises(ValueError, match="--to latent needs a file to write: --out latent.png"):
        call(*common)

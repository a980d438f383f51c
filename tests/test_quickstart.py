"""The main job, with a handful of steps in place of hundreds."""

from __future__ import annotations

import json
import re
import wave

import pytest
import torch
from PIL import Image

from omnimoe import from_pretrained
from omnimoe.cli import main

pytestmark = pytest.mark.timeout(280)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    out = tmp_path_factory.mktemp("quickstart")
    assert main(["quickstart", "--out", str(out), "--steps", "3"]) == 0
    return out


def test_the_checkpoint_is_a_model(run):
    model = from_pretrained(run / "checkpoint")
    assert model.config.modality_names == ("text", "image", "speech")
    assert torch.isfinite(model(torch.tensor([[1, 40, 41, 3]])).logits).all()


@pytest.mark.parametrize("name", ["curves.png", "pictures.png", "routing.png"])
def test_pictures_are_drawn(run, name):
    with Image.open(run / name) as picture:
        picture.load()
        assert min(picture.size) > 150
        assert len(picture.convert("L").getcolors(256)) > 10


def test_speech_is_a_sound(run):
    with wave.open(str(run / "speech.wav")) as sound:
        assert sound.getframerate() == 16_000
        assert sound.getnframes() > 0


def test_both_models_saw_the_same_data_and_are_compared(run):
    found = json.loads((run / "comparison.json").read_text())
    assert [row["model"] for row in found["rows"]] == ["dense_nano", "mot_nano"]
    assert found["rows"][0]["flops_per_token"] == found["rows"][1]["flops_per_token"]
    first, second = (found["histories"][name][0] for name in ("dense_nano", "mot_nano"))
    assert first["tokens"] == second["tokens"] > 0
    for history in (first, second):
        assert history["held_out"]["all"][-1] < history["held_out"]["all"][0]


def test_the_report_needs_no_other_file_and_says_what_next(run):
    page = (run / "report.html").read_text(encoding="utf-8")
    assert page.count('src="data:image/png;base64,') == 3
    assert not re.search(r'(src|href)="(?!data:)', page)
    for command in ("omnimoe generate", "omnimoe compare", "omnimoe train"):
        assert command in page

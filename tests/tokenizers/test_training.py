"""The trainings of our tokenizers, on a few real pictures."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from omnimoe.tokenizers import load_tokenizer
from omnimoe.tokenizers.picture import PictureTokenizer
from omnimoe.tokenizers.training import adversarial
from omnimoe.tokenizers.training.adversarial import Opponent
from omnimoe.tokenizers.training.picture import main

PICTURES = sorted((Path(__file__).parents[1] / "fixtures" / "pictures").glob("*.png"))
SHIPPED = Path(__file__).parents[2] / "omnimoe" / "tokenizers" / "weights" / "picture_64.safetensors"


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    """Five pictures to train on, and the others held out."""
    folder = tmp_path_factory.mktemp("corpus")
    held = [np.asarray(Image.open(path).convert("RGB").resize((64, 64), 3)) for path in PICTURES]
    np.save(folder / "images.npy", np.stack(held))
    rows = [json.dumps({"split": "train" if i < 5 else "test", "image": i}) for i in range(len(held))]
    (folder / "rows.jsonl").write_text("\n".join(rows) + "\n")
    return folder


def trained(corpus: Path, file: Path, *options: str) -> PictureTokenizer:
    shared = ["--corpus", str(corpus), "--out", str(file), "--batch-size", "4", "--steps", "3"]
    assert main([*shared, *options]) == 0
    return PictureTokenizer.from_pretrained(file)


def test_a_training_makes_a_tokenizer_and_repeats(corpus, tmp_path):
    made = trained(corpus, tmp_path / "one.safetensors")
    again = trained(corpus, tmp_path / "two.safetensors")
    assert (tmp_path / "one.safetensors").read_bytes() == (tmp_path / "two.safetensors").read_bytes()
    picture = np.load(corpus / "images.npy")[0]
    assert torch.equal(made.encode(picture), again.encode(picture))


@pytest.mark.parametrize("weight", ["0", "0.5"])
def test_a_decoder_alone_leaves_every_id(corpus, tmp_path, monkeypatch, weight):
    monkeypatch.setattr(adversarial, "WARMUP", 1)
    options = ("--init", str(SHIPPED), "--decoder-only", "--adversarial", weight)
    made, shipped = trained(corpus, tmp_path / "made.safetensors", *options), load_tokenizer("picture")
    pictures = np.load(corpus / "images.npy")
    ids = made.encode_batch(pictures)
    assert torch.equal(ids, shipped.encode_batch(pictures))
    assert not np.array_equal(made.decode_batch(ids), shipped.decode_batch(ids))


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--decoder-only"], "--decoder-only needs the weights of an encoder"),
        (["--adversarial", "-1"], "--adversarial must be finite and not negative, got -1.0"),
        (["--adversarial", "inf"], "--adversarial must be finite and not negative, got inf"),
    ],
)
def test_what_cannot_be_is_refused(corpus, tmp_path, capsys, options, told):
    with pytest.raises(SystemExit):
        trained(corpus, tmp_path / "made.safetensors", *options)
    assert told in capsys.readouterr().err


def test_the_opponent_learns_to_tell_blur_and_points_away_from_it():
    torch.manual_seed(0)
    real = torch.stack(
        [torch.from_numpy(np.array(Image.open(path).convert("RGB").resize((64, 64)))) for path in PICTURES]
    )
    real = real.permute(0, 3, 1, 2).float() / 127.5 - 1
    blurred = torch.nn.functional.avg_pool2d(real, 5, stride=1, padding=2)
    sharpness = torch.nn.Parameter(torch.zeros(1))
    opponent = Opponent(sharpness, weight=0.5)
    first = opponent.learn(blurred, real)
    for _ in range(adversarial.WARMUP):
        last = opponent.learn(blurred, real)
    assert last < 0.5 * first
    made = blurred + sharpness * (real - blurred)
    reconstruction = (made - real).abs().mean()
    (wanted,) = torch.autograd.grad(reconstruction, sharpness, retain_graph=True)
    (found,) = torch.autograd.grad(opponent.loss(made, real, reconstruction), sharpness)
    assert found < 0, "a sharper picture looks more real"
    torch.testing.assert_close(found.abs(), 0.5 * wanted.abs(), rtol=1e-2, atol=0)

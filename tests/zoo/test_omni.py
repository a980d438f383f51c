"""The weights that ship: they load offline, know what goes with what, and draw and speak from the command line."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from omnimoe import OmniMoeForCausalLM, list_models, load, model_info
from omnimoe.cli import main
from omnimoe.data import Corpus, default_ranges, evaluation_batches
from omnimoe.evaluate import evaluate
from omnimoe.generate import generate
from omnimoe.train.evaluation import evaluate as losses_of

NAMES = ("omni_nano", "omni_nano_dense")
LARGEST = 20_000_000
"""Bytes of a model that ships."""


@pytest.fixture(scope="module")
def corpus() -> Corpus:
    return Corpus.load("p")


@pytest.fixture(scope="module")
def models() -> dict[str, OmniMoeForCausalLM]:
    return {name: load(name, pretrained=True, dtype="float32") for name in NAMES}


def test_they_are_listed():
    assert set(NAMES) <= set(list_models(pretrained=True))


@pytest.mark.parametrize("name", NAMES)
def test_a_file_is_small_and_of_the_declared_model(name, models):
    folder = Path(model_info(name).pretrained.removeprefix("local-dir:"))
    assert sum(file.stat().st_size for file in folder.iterdir()) <= LARGEST
    assert sum(parameter.numel() for parameter in models[name].parameters()) == model_info(name).total_params
    assert load(name, pretrained=True).dtype == torch.bfloat16


@pytest.mark.parametrize("name", NAMES)
def test_held_out_losses_are_far_from_chance(name, models, corpus):
    batches = evaluation_batches(
        corpus, default_ranges(corpus), sequence_length=256, batch_size=8, axes=1, max_batches=4
    )
    found = losses_of(models[name], batches)
    assert found["text"] < math.log(2048) - 2
    assert found["image"] < math.log(1000) - 2
    assert found["speech"] < math.log(1000) - 1


def test_captions_find_their_pictures(models, corpus):
    found = evaluate({"omni_nano": models["omni_nano"]}, corpus=corpus, metrics=["retrieval"], num=60, candidates=(4,))
    assert found.find("retrieval", "text -> image, 1 of 4, gain", of="omni_nano").low > 0.25


def test_pictures_follow_the_caption(models):
    red, green = (
        np.mean([made.raw.reshape(-1, 3).mean(0) for made in drawn], axis=0)
        for drawn in (
            generate(models["omni_nano"], {"text": caption}, "image", num_samples=8, seed=0)
            for caption in ("red heart", "green heart")
        )
    )
    assert (red - green)[0] > 0 > (red - green)[1]


def test_the_command_draws_and_speaks_without_a_model_named(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    picture, sound = tmp_path / "apple.png", tmp_path / "apple.wav"
    assert (
        main(["generate", "--from", "text", "a red apple", "--to", "image", "--out", str(picture), "--seed", "0"]) == 0
    )
    assert Image.open(picture).size == (64, 64)
    assert main(["generate", "--from", "text", "apple", "--to", "speech", "--out", str(sound), "--seed", "0"]) == 0
    assert sound.stat().st_size > 4_000

"""Real weights: SmolLM2-135M made a model of three modalities keeps its perplexity, and learns from the real corpus."""

from __future__ import annotations

import math

import pytest
import torch

from omnimoe import from_pretrained, upcycle
from omnimoe.data import Corpus, retokenize_corpus
from omnimoe.tokenizers import load_tokenizer
from omnimoe.train import Training, TrainSettings
from omnimoe.upcycle import measure
from tests.zoo.seeds.smollm2 import tokenizer, write_smollm2
from tests.zoo.seeds.test_smollm2 import GENESIS, PERPLEXITY

TWO, THREE = {"image": 1000}, {"image": 1000, "speech": 1000}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The seed as it is published, with its tokenizer."""
    made = write_smollm2(tmp_path_factory.mktemp("smollm2"))
    tokenizer().save(str(made / "tokenizer.json"))
    return made


@pytest.fixture(scope="module")
def seed(folder):
    return from_pretrained(folder)


@pytest.mark.slow
@pytest.mark.parametrize(
    "asked",
    [
        {"modalities": TWO},
        {"modalities": TWO, "towers": "modality"},
        {"modalities": THREE, "towers": (0, 1, 1), "markers": "front"},
        {"modalities": TWO, "experts": {"text": 1, "image": 2}},
    ],
    ids=["rows", "two towers", "three modalities", "experts"],
)
def test_the_perplexity_stays_to_the_digit(seed, asked):
    ids = torch.tensor([tokenizer().encode(GENESIS).ids])
    report = upcycle(seed, batch=ids, return_report=True, **asked)[1]
    held = report.measured
    assert report.is_preserved
    assert math.exp(held.loss) == pytest.approx(PERPLEXITY, rel=1e-4)
    assert held.new_loss == pytest.approx(held.loss, rel=1e-6)
    assert held.difference <= (1e-4 if "experts" in asked else 0)
    # rows that no text uses take next to nothing of the softmax; in front are also copies of its begin and end
    assert math.exp(held.open_loss) == pytest.approx(math.exp(held.loss), rel=2e-4)
    assert held.new_share < 2e-4


@pytest.mark.slow
@pytest.mark.parametrize(
    ("modalities", "towers"), [(TWO, "modality"), (THREE, (0, 1, 1))], ids=["pictures", "pictures and speech"]
)
def test_it_learns_beside_a_frozen_text_tower(folder, seed, tmp_path, modalities, towers):
    words = load_tokenizer("hf_text", str(folder / "tokenizer.json"))
    corpus = Corpus.load(retokenize_corpus("p", tmp_path / "corpus", words))
    model, report = upcycle(seed, modalities=modalities, towers=towers, markers="front", return_report=True)
    settings = TrainSettings(
        steps=8,
        batch_size=2,
        sequence_length=128,
        learning_rate=2e-3,
        warmup=2,
        text_share=0.1,
        freeze="text",
        evaluate_every=0,
        evaluate_batches=2,
    )
    run = Training(model, settings, corpus=corpus, show_progress=False)
    losses = run.run().held_out
    for name in modalities:
        assert losses[name][-1] < losses[name][0] - 0.5
    ids = torch.tensor([tokenizer().encode(GENESIS).ids])
    held = measure(seed, model.float(), report.vocabulary, ids)
    assert held.difference == 0
    assert held.new_loss == held.loss

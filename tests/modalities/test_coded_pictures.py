"""Pictures as codes whose autoencoder is a part of the model."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from omnimoe import OmniMoeConfig, OmniMoeForCausalLM, Tokens, from_pretrained
from omnimoe.config import ConfigError
from omnimoe.modalities import CodedPictures
from omnimoe.tokenizers import TokenizerError
from omnimoe.tokenizers.raster import to_middle
from omnimoe.tokenizers.vq_autoencoder import VqAutoencoder

PICTURES = sorted((Path(__file__).parents[1] / "fixtures" / "pictures").glob("*.png"))[:3]
NET = VqAutoencoder.Config(
    image_size=8, channels=32, multipliers=(1, 2), num_blocks=1, latent_channels=8, code_channels=4, num_codes=12
)
IMAGE = CodedPictures.Config(
    name="image", vocab_start=4, vocab_size=12, begin_id=16, end_id=17, num_tokens=16, autoencoder=NET
)
CONFIG = OmniMoeConfig(
    hidden_size=32,
    num_layers=1,
    modalities=(Tokens.Config(name="text", vocab_size=40), IMAGE),
    bos_token_id=0,
    pad_token_id=1,
    eos_token_id=2,
)
MIXED = tuple((5 * code + 2) % 12 for code in range(12))


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    made = OmniMoeForCausalLM(CONFIG).eval()
    with torch.no_grad():
        for buffer in made.model.modalities["image"].buffers():
            buffer.add_(torch.randn_like(buffer) * 0.2)
    return made


def test_its_weights_are_saved_with_the_model_and_never_trained(model, tmp_path):
    names = [name for name in model.state_dict() if "autoencoder" in name]
    assert len(names) == len(NET.build().state_dict())
    assert not any("autoencoder" in name for name, _ in model.named_parameters())
    ids = torch.tensor([[0, 20, 21, 16, *range(4, 16), 4, 5, 6, 7, 17, 2]])
    model(ids, labels=ids).loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    model.zero_grad()
    model.save_pretrained(tmp_path)
    again = from_pretrained(tmp_path)
    assert all(torch.equal(tensor, again.state_dict()[name]) for name, tensor in model.state_dict().items())
    assert not any("autoencoder" in name for name, _ in again.named_parameters())
    assert again.to(torch.bfloat16).model.modalities["image"].autoencoder.quant_conv.weight.dtype == torch.bfloat16
    assert torch.equal(
        from_pretrained(tmp_path).model.modalities["image"].tokenizer.encode(PICTURES[0]),
        model.model.modalities["image"].tokenizer.encode(PICTURES[0]),
    )


def test_the_config_goes_through_json():
    config = CONFIG.replace(modalities=(CONFIG.modalities[0], IMAGE.replace(codes=MIXED)))
    again = OmniMoeConfig.from_dict(json.loads(json.dumps(config.to_dict())))
    assert again.modalities == config.modalities
    assert again.token_ranges == config.token_ranges
    assert (again.token_ranges["image"].start, again.token_ranges["image"].size) == (4, 12)


@torch.no_grad()
def test_rows_may_stand_for_codes_in_another_order(model):
    plain = model.model.modalities["image"]
    mixed = IMAGE.replace(codes=MIXED).build(hidden_size=32)
    mixed.load_state_dict(plain.state_dict())
    pixels = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
    codes, rows = plain.encode(pixels), mixed.encode(pixels)
    assert torch.equal(torch.tensor(MIXED)[rows], codes)
    assert torch.equal(mixed.decode(rows), plain.decode(codes))


def test_pictures_of_any_kind_and_back(model):
    tokenizer = model.model.modalities["image"].tokenizer
    ids = tokenizer.encode_batch(PICTURES)
    assert ids.shape == (3, 16)
    assert torch.equal(ids[1], tokenizer.encode(PICTURES[1]))
    assert tokenizer.encode_batch([]).shape == (0, 16)
    made = tokenizer.decode(ids[0])
    assert made.shape == (8, 8, 3)
    assert made.dtype == np.uint8
    span = tokenizer(PICTURES[0])
    assert (span.modality, span.markers, span.positions[5].tolist()) == ("image", ("<image>", "</image>"), [0, 1, 1])
    with pytest.raises(TokenizerError, match="use encode for one"):
        tokenizer.encode_batch(str(PICTURES[0]))
    with pytest.raises(TokenizerError, match=r"0\.\.11"):
        tokenizer.decode(torch.full((16,), 12))
    with pytest.raises(TokenizerError, match="one picture"):
        tokenizer.decode(torch.zeros(2, 16, dtype=torch.int64))
    without = IMAGE.replace(autoencoder=NET.replace(has_decoder=False)).build(hidden_size=32).tokenizer
    with pytest.raises(TokenizerError, match="without the decoder"):
        without.decode(torch.zeros(16, dtype=torch.int64))


def test_the_middle_of_a_picture():
    """The shorter side is brought to the size, and of the longer one the ends fall away; nothing is padded."""
    wide = np.zeros((10, 30, 3), np.uint8)
    wide[:, 10:20] = 200
    found = to_middle(wide, 20)
    assert found.shape == (20, 20, 3)
    assert (found[:, 3:-3] > 150).all()
    assert to_middle(wide[:, :10], 10).shape == (10, 10, 3)
    assert np.array_equal(to_middle(wide[:, 10:20], 10), wide[:, 10:20])
    seen_through = Image.new("RGBA", (6, 9), (0, 0, 0, 0))
    assert (to_middle(seen_through, 4) == 255).all()
    with pytest.raises(TokenizerError, match="a picture is a path"):
        to_middle(3, 4)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vocab_size": 13}, "has 13 rows, and its autoencoder 12 codes"),
        ({"num_tokens": None}, "has 16 codes, so num_tokens must be 16, got None"),
        ({"codes": (0,) * 12}, "must name each of its 12 codes once"),
    ],
)
def test_what_does_not_fit_is_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        IMAGE.replace(**changes)


def test_features_for_it_are_refused(model):
    with pytest.raises(ValueError, match="the continuous modalities are none"):
        model(torch.tensor([[4, 5]]), features={"image": torch.zeros(2, 3)})

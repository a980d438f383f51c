"""A SigLIP tower over pictures of any shape, beside transformers' own where both can see the same picture."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import SiglipVisionConfig, SiglipVisionModel

from omnimoe.config import ConfigError
from omnimoe.encoders import EncoderError, Features
from omnimoe.encoders.siglip import Siglip, fit_size

PICTURES = sorted((Path(__file__).parents[1] / "fixtures" / "pictures").glob("*.png"))
CONFIG = Siglip.Config(
    hidden_size=16, intermediate_size=24, num_layers=2, num_heads=2, patch_size=8, max_side=4, shortest=8
)


@pytest.fixture(scope="module")
def encoder() -> Siglip:
    torch.manual_seed(0)
    return Siglip(CONFIG).eval()


def test_a_full_square_is_what_transformers_gives(encoder):
    form = SiglipVisionConfig(
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        patch_size=8,
        image_size=32,
        vision_use_head=False,
    )
    peer = SiglipVisionModel(form).eval()
    held = {name.removeprefix("vision_model."): tensor for name, tensor in peer.state_dict().items()}
    named = {
        name.replace("embeddings.", "").replace("encoder.", ""): tensor
        for name, tensor in held.items()
        if "position_ids" not in name
    }
    # kernels by channel, row and column; patches by row, column and channel
    named["patch_embedding.weight"] = named["patch_embedding.weight"].permute(0, 2, 3, 1).flatten(1)
    mine = Siglip(CONFIG).eval()
    mine.load_state_dict(named)
    picture = np.random.default_rng(0).integers(0, 255, (32, 32, 3), dtype=np.uint8)
    pixels = torch.from_numpy(picture).permute(2, 0, 1)[None] / 127.5 - 1
    with torch.no_grad():
        wanted = peer(pixel_values=pixels).last_hidden_state
    torch.testing.assert_close(mine.encode([picture]).rows, wanted, atol=1e-5, rtol=1e-4)


def test_pictures_of_one_batch_do_not_see_each_other(encoder):
    shapes = [(8, 8), (24, 8), (16, 32)]
    held = [np.random.default_rng(place).integers(0, 255, (*shape, 3), np.uint8) for place, shape in enumerate(shapes)]
    together = encoder.encode(held)
    assert together.rows.shape == (3, 8, 16)
    assert together.mask.sum(1).tolist() == [1, 3, 8]
    assert together.places[1, :3].tolist() == [0, 4, 8], "rows of a picture one patch wide"
    for place, picture in enumerate(held):
        alone = encoder.encode([picture])
        assert alone.mask is None
        torch.testing.assert_close(together.rows[place, : alone.rows.shape[1]], alone.rows[0], atol=1e-6, rtol=1e-5)
        torch.testing.assert_close(together.pooled[place], alone.rows[0].mean(0), atol=1e-6, rtol=1e-5)


def test_features_of_several_batches_keep_their_places(encoder):
    held = [Image.new("RGB", (8, 8)), Image.new("RGB", (32, 24))]
    joined = encoder.encode(held, batch_size=1)
    assert isinstance(joined, Features)
    assert joined.places.shape == joined.rows.shape[:2]
    assert joined[1].places.tolist() == [[0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11]]
    assert joined.to(torch.bfloat16).places.dtype == torch.int64


def test_real_pictures_keep_their_shape(encoder):
    wide = Image.open(PICTURES[0]).resize((60, 30))
    assert encoder.prepare([wide])["mask"].sum().item() == 4 * 2


@pytest.mark.parametrize(
    ("size", "wanted"),
    [
        ((100, 100), (224, 224)),
        ((500, 300), (504, 294)),
        ((4000, 1000), (980, 252)),
        ((3000, 10), (980, 14)),
        ((980, 980), (980, 980)),
    ],
)
def test_sizes_that_pictures_are_brought_to(size, wanted):
    assert fit_size(*size, patch_size=14, shortest=224, longest=980) == wanted


def test_what_is_no_picture_or_does_not_fit_is_refused(encoder):
    with pytest.raises(EncoderError, match="input 0: a picture is a path"):
        encoder.prepare([3.5])
    with pytest.raises(EncoderError, match=r"at most 4 of each, got \(5, 1, 192\)"):
        encoder.pad([torch.zeros(5, 1, 192)])
    with pytest.raises(ConfigError, match="num_heads 3 must divide hidden_size 16"):
        CONFIG.replace(num_heads=3)
    with pytest.raises(ConfigError, match="max_side must be at least 1, got 0"):
        CONFIG.replace(max_side=0)

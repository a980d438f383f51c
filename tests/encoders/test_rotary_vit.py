"""The rotary vision tower: pictures and clips of any shape, each as if it were alone."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers.models.ernie4_5_vl_moe.image_processing_pil_ernie4_5_vl_moe import Ernie4_5_VLMoeImageProcessorPil

from omnimoe.config import ConfigError
from omnimoe.encoders import EncoderError, Features, load_encoder
from omnimoe.encoders.rotary_vit import RotaryViT, fit_pixels

PICTURES = sorted((Path(__file__).parents[1] / "fixtures" / "pictures").glob("*.png"))


@pytest.fixture(scope="module")
def tower() -> RotaryViT:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_layers": 2, "num_heads": 2, "out_size": 24}
    made = RotaryViT.Config(**sizes).build()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return made


def drawn(tall: int, wide: int) -> Image.Image:
    pixels = np.random.default_rng(tall * wide).integers(0, 256, (tall, wide, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def test_patches_are_those_of_the_published_processor(tower):
    pictures = [drawn(60, 90), drawn(200, 57), drawn(20, 33), *(Image.open(path).convert("RGB") for path in PICTURES)]
    wanted = Ernie4_5_VLMoeImageProcessorPil()(pictures, return_tensors="pt")
    found = tower.prepare(pictures)
    assert torch.equal(found["grids"], wanted["image_grid_thw"])
    padded = tower.pad(wanted["pixel_values"], wanted["image_grid_thw"])
    assert torch.equal(found["patches"], padded["patches"])


@torch.no_grad()
def test_a_picture_gives_the_same_alone_and_beside_others(tower):
    raws = [drawn(60, 90), [drawn(60, 60), drawn(60, 60)], drawn(120, 56), drawn(60, 90)]
    together = tower(tower.prepare(raws))
    assert together.shapes.tolist() == [[1, 2, 3], [1, 2, 2], [1, 4, 2], [1, 2, 3]]
    assert together.rows.shape == (4, 8, 24)
    for place, raw in enumerate(raws):
        alone = tower(tower.prepare([raw]))
        assert alone.mask is None
        torch.testing.assert_close(together.rows[place][together.mask[place]], alone.rows[0], atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(together.pooled[place], alone.pooled[0], atol=1e-5, rtol=1e-4)
    again = Features.cat([together[:2], together[2:]])
    assert torch.equal(again.shapes, together.shapes)
    assert again.to(torch.float16).shapes.dtype == torch.int64


@torch.no_grad()
def test_frames_see_their_own_frame_and_two_become_one(tower):
    frames = [drawn(56, 56), drawn(60, 60).resize((56, 56)), drawn(70, 70).resize((56, 56))]
    clip = tower.prepare([frames])
    assert clip["grids"].tolist() == [[4, 4, 4]]
    rows = tower(clip).rows[0].unflatten(0, (2, 4))
    stacked = torch.from_numpy(np.stack([np.asarray(frame) for frame in (*frames, frames[-1])]))
    assert torch.equal(tower.prepare([stacked])["patches"], clip["patches"])
    first = tower(tower.prepare([frames[:2]])).rows[0]
    torch.testing.assert_close(rows[0], first, atol=1e-5, rtol=1e-4)
    still = tower(tower.prepare([frames[2]])).rows[0]  # a picture stands for both of its frames, as a held one does
    torch.testing.assert_close(rows[1], still, atol=1e-5, rtol=1e-4)
    assert not torch.allclose(rows[0], rows[1], atol=1e-2)


@pytest.mark.parametrize(
    ("size", "wanted"),
    [((10, 10), (56, 56)), ((100, 400), (112, 392)), ((3000, 3000), (1120, 1120)), ((29, 5600), (28, 5600))],
)
def test_sizes(size, wanted):
    assert fit_pixels(*size, factor=28, least=56 * 56, most=1120 * 1120) == wanted


def test_every_weight_gets_a_gradient(tower):
    tower.freeze(False)
    tower(tower.prepare([drawn(60, 90)])).rows.square().sum().backward()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in tower.parameters())
    tower.freeze()


def test_it_is_loaded_by_its_name():
    assert load_encoder("rotary_vit", num_layers=1, hidden_size=32, num_heads=2, out_size=8).hidden_size == 8


def test_what_is_no_picture_is_refused(tower):
    with pytest.raises(EncoderError, match="input 1"):
        tower.prepare([drawn(60, 60), "no such file"])
    with pytest.raises(EncoderError, match="without frames"):
        tower.prepare([[]])
    with pytest.raises(EncoderError, match="must have one size"):
        tower.prepare([[drawn(60, 60), drawn(60, 61)]])
    with pytest.raises(EncoderError, match="is too long"):
        tower.prepare([drawn(1, 300)])
    with pytest.raises(EncoderError, match="grids tell of 16 patches"):
        tower.pad(torch.zeros(15, 588), torch.tensor([[1, 4, 4]]))
    for grid in ([1, 3, 4], [3, 4, 4], [1, 0, 4]):
        with pytest.raises(EncoderError, match="must be multiples of 2"):
            tower({"patches": torch.zeros(1, 48, 588), "grids": torch.tensor([grid])})
    with pytest.raises(EncoderError, match="grids tell of 64 patches, and there are 48"):
        tower({"patches": torch.zeros(1, 48, 588), "grids": torch.tensor([[1, 8, 8]])})


@pytest.mark.parametrize(
    "wrong", [{"num_heads": 640}, {"num_layers": 0}, {"num_heads": 0}, {"max_pixels": 100}, {"min_pixels": 0}]
)
def test_a_tower_that_cannot_be_is_refused(wrong):
    with pytest.raises(ConfigError, match="must be"):
        RotaryViT.Config(**wrong)

"""Towers that merge squares of patches: what they are given, and what they give back."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from omnimoe.config import ConfigError
from omnimoe.encoders import EncoderError, Features
from omnimoe.encoders.merged import Cosmos3Edge, Merged, Qwen3VL

SMALL = {"hidden_size": 32, "intermediate_size": 40, "num_heads": 2, "num_places": 16, "patch_size": 4, "out_size": 24}
CONFIGS = {
    "qwen3_vl": Qwen3VL.Config(num_layers=3, deep_layers=(0, 2), **SMALL),
    "cosmos3_edge": Cosmos3Edge.Config(num_layers=2, merger_size=20, **SMALL),
}
SIZES = {"size": {"shortest_edge": 64, "longest_edge": 4096}}


@pytest.fixture(scope="module", params=CONFIGS)
def encoder(request) -> Merged:
    torch.manual_seed(0)
    return CONFIGS[request.param].build().freeze()


def pictures() -> list[np.ndarray]:
    draw = np.random.default_rng(0)
    return [draw.integers(0, 255, (*shape, 3), dtype=np.uint8) for shape in ((16, 24), (8, 8), (24, 16))]


@torch.no_grad()
def test_pictures_of_one_batch_do_not_see_each_other(encoder):
    held = pictures()
    given = encoder.prepare(held, **SIZES)
    together = encoder(given)
    assert encoder.hidden_size == together.rows.shape[2] == 24 * (1 + encoder.config.depth)
    assert encoder.shapes(given) == [(1, 2, 3), (1, 1, 1), (1, 3, 2)]
    assert together.shapes.tolist() == [[1, 2, 3], [1, 1, 1], [1, 3, 2]]
    for place, picture in enumerate(held):
        alone = encoder(encoder.prepare([picture], **SIZES))
        count = alone.rows.shape[1]
        assert together.mask is not None
        assert int(together.mask[place].sum()) == count
        torch.testing.assert_close(together.rows[place, :count], alone.rows[0], atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(together.pooled[place], alone.rows[0].mean(0), atol=1e-5, rtol=1e-4)


def test_patches_are_those_of_the_published_processor(encoder):
    from transformers import Cosmos3EdgeImageProcessor, Qwen2VLImageProcessor

    held = [Image.fromarray(picture) for picture in pictures()]
    if isinstance(encoder, Qwen3VL):
        norm = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
        peer = Qwen2VLImageProcessor(patch_size=4, merge_size=2, temporal_patch_size=2, **norm, **SIZES)
    else:
        peer = Cosmos3EdgeImageProcessor(patch_size=4, merge_size=2, **SIZES)
    wanted = peer(images=held, return_tensors="pt")
    given = encoder.prepare(held, **SIZES)
    assert torch.equal(given["patches"][given["mask"]], wanted["pixel_values"])
    assert torch.equal(given["grids"], wanted["image_grid_thw"])


def test_gradients_reach_every_weight(encoder):
    made = encoder.config.build().freeze(False)
    made(made.prepare(pictures(), **SIZES)).rows.square().sum().backward()
    assert all(parameter.grad is not None for parameter in made.parameters())


def test_features_are_kept_and_put_together(encoder):
    parts = [encoder.encode([picture], **SIZES) for picture in pictures()]
    joined = Features.cat(parts)
    assert joined.shapes.tolist() == [[1, 2, 3], [1, 1, 1], [1, 3, 2]]
    assert joined[1].shapes.tolist() == [[1, 1, 1]]


def test_what_does_not_fit_is_refused(encoder):
    with pytest.raises(EncoderError, match=r"grids tell of 4 patches, got \(5, 48\)"):
        encoder.pad(torch.zeros(5, 48), torch.tensor([[1, 2, 2]]))
    with pytest.raises(EncoderError, match="input 0"):
        encoder.prepare(["no picture"])
    with pytest.raises(ConfigError, match="num_heads 5 must divide hidden_size 32"):
        encoder.config.replace(num_heads=5)
    with pytest.raises(ConfigError, match="those of a square grid, got 15"):
        encoder.config.replace(num_places=15)
    with pytest.raises(ConfigError, match="patch_size must be at least 1, got 0"):
        encoder.config.replace(patch_size=0)

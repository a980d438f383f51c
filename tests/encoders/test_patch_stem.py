"""Patches by one linear map: a convolution whose stride is its size."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from omnimoe import ConfigError
from omnimoe.encoders import Encoder, EncoderError
from omnimoe.encoders.patch_stem import PatchStem

STEM = PatchStem(PatchStem.Config(hidden_size=6, image_size=8, patch_size=4))


def test_is_a_convolution_behind_a_class_row():
    pixels = torch.randn(2, 3, 8, 8)
    kernel = STEM.proj.weight.view(6, 4, 4, 3).permute(0, 3, 1, 2)
    wanted = F.conv2d(pixels, kernel, STEM.proj.bias, stride=4).flatten(2).transpose(1, 2)
    found = STEM(STEM.patches(pixels))
    torch.testing.assert_close(found.rows[:, 1:], wanted)
    torch.testing.assert_close(found.rows[:, 0], STEM.cls_token.expand(2, -1))
    assert found.rows.shape[1] == STEM.num_tokens == STEM.config.num_rows == 5


def test_masked_patches_become_the_learned_row():
    hidden = torch.tensor([[True, False, False, True]])
    STEM.mask_token.data.fill_(3.0)
    plain, masked = STEM.patches(torch.randn(1, 3, 8, 8)), {"masked": hidden}
    seen = STEM(plain).rows[:, 1:]
    found = STEM({**plain, **masked}).rows[:, 1:]
    assert bool((found[hidden] == 3).all())
    torch.testing.assert_close(found[~hidden], seen[~hidden])
    STEM.zero_grad()
    STEM(plain).rows.sum().backward()
    assert not STEM.mask_token.grad.any()


def test_pictures_of_any_shape():
    picture = Image.fromarray(np.full((30, 50, 3), 255, dtype=np.uint8))
    given = STEM.prepare([picture, np.zeros((8, 8, 3), dtype=np.uint8)])["patches"]
    assert given.shape == (2, 4, 48)
    assert bool((given[0] == 1).all())
    assert bool((given[1] == -1).all())
    with pytest.raises(EncoderError, match="input 0"):
        STEM.prepare(["no such picture.png"])
    with pytest.raises(EncoderError, match=r"\(B, 3, 8, 8\), got \(1, 3, 8, 4\)"):
        STEM.patches(torch.zeros(1, 3, 8, 4))


def test_config():
    plain = STEM.config.to_dict()
    assert Encoder.Config.from_dict(plain) == STEM.config
    with pytest.raises(ConfigError, match="patch_size 3 must divide image_size 8"):
        PatchStem.Config(image_size=8, patch_size=3)

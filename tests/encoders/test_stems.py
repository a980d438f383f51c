"""The stems of ONE-PEACE: what they take, and what they refuse; the numbers are held in tests/zoo/one_peace."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import Data2VecAudioConfig
from transformers.models.data2vec import modeling_data2vec_audio as data2vec

from omnimoe.config import ConfigError
from omnimoe.encoders.base import EncoderError
from omnimoe.encoders.nested_stem import DEVIATION, MEAN, NestedStem
from omnimoe.encoders.wave_stem import WaveStem


def test_pictures_are_scaled_as_clips():
    stem = NestedStem.Config(hidden_size=8, image_size=32).build()
    pixels = stem.prepare([np.full((20, 40, 3), 255, dtype=np.uint8)])["pixels"]
    assert pixels.shape == (1, 3, 32, 32)
    wanted = (1 - torch.tensor(MEAN)) / torch.tensor(DEVIATION)
    torch.testing.assert_close(pixels[0, :, 5, 7], wanted)
    found = stem({"pixels": pixels})
    assert found.rows.shape == (1, 5, 8)
    assert torch.equal(found.pooled[0], stem.cls_token)
    with pytest.raises(EncoderError, match=r"pixels must be \(B, 3, 32, 32\), got \(1, 3, 16, 16\)"):
        stem({"pixels": torch.zeros(1, 3, 16, 16)})
    with pytest.raises(ConfigError, match="image_size 40 of 16"):
        NestedStem.Config(hidden_size=8, image_size=40)


def test_clips_are_normal_and_between_one_second_and_fifteen():
    stem = WaveStem.Config(hidden_size=16, inner_size=8, position_groups=4).build()
    noise = np.random.default_rng(0).uniform(-0.3, 0.3, 20 * 16_000).astype(np.float32)
    given = stem.prepare([noise[:5_000], noise])
    assert given["lengths"].tolist() == [16_000, 15 * 16_000]
    short = given["waves"][0, :5_000]
    assert abs(float(short.mean())) < 1e-4
    assert float(short.var(unbiased=False)) == pytest.approx(1, abs=1e-3)
    assert torch.equal(given["waves"][0, 5_000:10_000], short), "a short clip is repeated"
    found = stem(given)
    assert found.mask.sum(1).tolist() == [50, 750], "50 rows a second, of which the last lacks samples, and one before"
    alone = stem({"waves": given["waves"][:1, :16_000], "lengths": given["lengths"][:1]})
    torch.testing.assert_close(found.rows[0, :50], alone.rows[0])
    with pytest.raises(EncoderError, match="clip 0 is too short"):
        stem({"waves": torch.zeros(1, 300), "lengths": torch.tensor([300])})
    for wrong in ({"strides": (5,)}, {"position_kernel": 4}, {"position_groups": 5}):
        with pytest.raises(ConfigError):
            WaveStem.Config(**{"hidden_size": 16, "position_groups": 4, **wrong})


def test_sound_enters_as_in_data2vec():
    """The convolutions, their projection and those of positions are transformers', with the same weights."""
    config = Data2VecAudioConfig(
        hidden_size=32,
        conv_dim=(16, 16, 16),
        conv_kernel=(10, 3, 2),
        conv_stride=(5, 2, 2),
        num_feat_extract_layers=3,
        num_conv_pos_embeddings=2,
        conv_pos_kernel_size=5,
        num_conv_pos_embedding_groups=4,
        layer_norm_eps=1e-5,
    )
    torch.manual_seed(0)
    hears = data2vec.Data2VecAudioFeatureEncoder(config).eval()
    widens = data2vec.Data2VecAudioFeatureProjection(config).eval()
    places = data2vec.Data2VecAudioPositionalConvEmbedding(config).eval()
    stem = WaveStem.Config(
        hidden_size=32,
        inner_size=16,
        kernels=(10, 3, 2),
        strides=(5, 2, 2),
        position_layers=2,
        position_kernel=5,
        position_groups=4,
    ).build()
    with torch.no_grad():
        for part in (hears, widens):
            for parameter in part.parameters():
                parameter.add_(0.2 * torch.randn_like(parameter))
        for place, layer in enumerate(hears.conv_layers):
            stem.convolutions[place].weight.copy_(layer.conv.weight)
            stem.norms[place].load_state_dict(layer.layer_norm.state_dict())
        stem.norm.load_state_dict(widens.layer_norm.state_dict())
        stem.proj.load_state_dict(widens.projection.state_dict())
        for place, layer in enumerate(places.layers):
            stem.positions[place].load_state_dict(layer.conv.state_dict())
        waves = torch.randn(2, 600)
        rows = widens(hears(waves).transpose(1, 2))[0]
        found = stem({"waves": waves, "lengths": torch.tensor([600, 600])})
    torch.testing.assert_close(found.rows[:, 1:], rows + places(rows), atol=1e-5, rtol=1e-5)

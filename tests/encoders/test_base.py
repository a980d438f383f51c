"""The table of encoders, and features as a thing."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import nn

from omnimoe.config import ConfigError
from omnimoe.encoders import ENCODERS, Encoder, Features, load_encoder, register_encoder
from omnimoe.registry import RegistryError


@pytest.fixture
def mean_colour():
    @register_encoder("mean_colour")
    class MeanColour(Encoder):
        kind = "image"
        hidden_size = 4

        @dataclass(frozen=True, kw_only=True)
        class Config(Encoder.Config):
            scale: float = 1.0
            """Factor."""

        def __init__(self, config, *, weights=True):
            super().__init__(config)
            self.network = nn.Linear(3, 4)
            self.freeze()

        def prepare(self, raws, **options):
            return {"pixels": torch.stack([torch.as_tensor(raw).float() for raw in raws])}

        def forward(self, inputs):
            rows = self.network(inputs["pixels"].flatten(1, 2)) * self.config.scale
            return Features(rows=rows, pooled=rows.mean(1))

    yield MeanColour
    ENCODERS.remove("mean_colour")


def test_an_encoder_of_ones_own(mean_colour):
    encoder = load_encoder("mean_colour", scale=2.0)
    found = encoder.encode([torch.full((2, 2, 3), shade) for shade in range(5)], batch_size=2)
    assert found.rows.shape == (5, 4, 4)
    assert found.mask is None
    config = Encoder.Config.from_dict(encoder.config.to_dict())
    assert config == encoder.config == mean_colour.Config(scale=2.0)
    assert isinstance(config.build(weights=False), mean_colour)


def test_names_and_fields_are_checked():
    with pytest.raises(RegistryError, match="did you mean 'whisper_tiny'"):
        load_encoder("whisper_tinny")
    with pytest.raises(ConfigError, match="no field 'size'"):
        load_encoder("efficientnet_lite0", size=64)
    assert {"efficientnet_lite0", "whisper_tiny", "minilm", "hf_vision", "hf_audio"} <= set(ENCODERS.names())


def ragged() -> Features:
    mask = torch.tensor([[True, True, False], [True, True, True]])
    return Features(rows=torch.randn(2, 3, 4), pooled=torch.randn(2, 5), mask=mask)


def test_features_are_joined_and_taken_apart():
    first, second = ragged(), Features(rows=torch.randn(1, 2, 4), pooled=torch.randn(1, 5))
    both = Features.cat([first, second])
    assert len(both) == 3
    assert both.mask.tolist() == [[True, True, False], [True, True, True], [True, True, False]]
    assert torch.equal(both.rows[2, :2], second.rows[0])
    assert not both.rows[2, 2].any()
    turned = both[[2, 0]]
    assert torch.equal(turned.pooled, torch.cat((second.pooled, first.pooled[:1])))
    assert len(both[1]) == 1
    assert torch.equal(both[1:].rows, both.rows[1:])


def test_features_move_and_keep_their_mask():
    moved = ragged().to(torch.float64)
    assert (moved.rows.dtype, moved.pooled.dtype, moved.mask.dtype) == (torch.float64, torch.float64, torch.bool)
    rows = torch.randn(1, 2, 4, requires_grad=True)
    assert not Features(rows=rows, pooled=rows[:, 0]).detach().rows.requires_grad

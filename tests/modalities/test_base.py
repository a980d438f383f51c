"""A modality of one's own."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from omnimoe.modalities import MODALITIES, Modality, register_modality
from tests.declarations import DENSE, TEXT, build


def test_a_modality_says_what_it_does_not_define():
    @register_modality("half_done_test")
    class HalfDone(Modality):
        def __init__(self, config, *, hidden_size):
            super().__init__()

    try:
        made = HalfDone.Config(name="x").build(hidden_size=4)
        with pytest.raises(TypeError, match="HalfDone does not define embed"):
            made.embed(torch.zeros(1, 4))
        with pytest.raises(TypeError, match="HalfDone does not define head"):
            made.head(torch.zeros(1, 4))
    finally:
        MODALITIES.remove("half_done_test")


def test_a_modality_of_ones_own_enters_and_leaves_the_model():
    @register_modality("sensor_test")
    class Sensor(Modality):
        def __init__(self, config, *, hidden_size):
            super().__init__()
            self.into, self.out = nn.Linear(3, hidden_size), nn.Linear(hidden_size, 3)

        def embed(self, inputs, timesteps=None):
            return self.into(inputs)

        def head(self, x):
            return self.out(x)

    try:
        config = DENSE.replace(modalities=(TEXT, Sensor.Config(name="sensor", placeholder_id=9, loss_weight=2.0)))
        model, ids, rows = build(config), torch.tensor([[8, 9, 9, 10]]), torch.randn(2, 3)
        out = model(ids, labels=ids, features={"sensor": rows}, targets={"sensor": rows})
        out.loss.backward()
        assert model.model.modalities["sensor"].into.weight.grad.any()
        torch.testing.assert_close(out.losses["sensor"], (out.predictions["sensor"] - rows).square().mean())
        assert config.from_dict(config.to_dict()).modalities == config.modalities
    finally:
        MODALITIES.remove("sensor_test")

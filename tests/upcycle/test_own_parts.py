"""A part of one's own is grown as it says, and a misfit is refused by name."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import torch
from torch import nn

from omnimoe import ConfigError, Experts, upcycle
from omnimoe.experts.base import EXPERTS, register_experts
from omnimoe.upcycle import Choices, Plan, Start, start_of
from tests.declarations import DENSE, build, ids_like


@pytest.fixture
def gains() -> Iterator[type[Experts]]:
    """Experts that scale a row by a vector of its key, which is no bank."""

    @register_experts("gains")
    class Gains(Experts):
        @dataclass(frozen=True, kw_only=True)
        class Config(Experts.Config):
            pass

        def __init__(self, config, *, hidden_size, num_modalities, layer_idx):
            super().__init__()
            self.gain = nn.Parameter(torch.randn(num_modalities, hidden_size))

        def forward(self, x, rows):
            return x * self.gain[rows.key_ids], None

    yield Gains
    EXPERTS.remove("gains")


def test_a_part_says_how_its_copies_start(gains):
    seed = build(DENSE.replace(experts=gains.Config()))
    with pytest.raises(ConfigError, match=r"mlp.gain is to be \(4, 16\), .* has \(3, 16\) .*start_of"):
        upcycle(seed, modalities={"video": 6})

    @start_of.register(gains)
    def _(new: nn.Module, old: nn.Module, choices: Choices) -> Plan:
        return Plan({"gain": Start("gain", choices.origin)})

    model, report = upcycle(
        seed, modalities={"video": 6}, start_from={"video": "speech"}, batch=ids_like(DENSE), return_report=True
    )
    assert report.measured.difference == 0
    gain = model.model.backbone.layers[0].mlp.gain
    assert torch.equal(gain[3], gain[2])

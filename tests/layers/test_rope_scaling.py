"""Scalings of rotary frequencies: transformers' own functions are the oracle."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from omnimoe import Attention, ConfigError, OmniMoeConfig, RegistryError, Rope
from omnimoe.layers.rope_scaling import LinearScaling, Llama3Scaling, YarnScaling

CASES = {
    "linear": (LinearScaling.Config(factor=2.5), {"factor": 2.5}),
    "llama3": (
        Llama3Scaling.Config(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_length=8192),
        {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192},
    ),
    "yarn": (
        YarnScaling.Config(factor=32.0, original_length=4096),
        {"factor": 32.0, "original_max_position_embeddings": 4096},
    ),
    "yarn untruncated": (
        YarnScaling.Config(factor=40.0, original_length=4096, beta_fast=16.0, truncate=False, attention_factor=1.0),
        {"factor": 40.0, "original_max_position_embeddings": 4096, "beta_fast": 16.0, "truncate": False}
        | {"attention_factor": 1.0},
    ),
    "yarn unstretched": (
        YarnScaling.Config(factor=1.0, original_length=4096),
        {"factor": 1.0, "original_max_position_embeddings": 4096},
    ),
}


@pytest.mark.parametrize("theta", [10_000.0, 500_000.0])
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("name", CASES)
def test_tables_are_those_of_transformers(name, head_dim, theta):
    scaling, told = CASES[name]
    given = {"rope_type": name.split()[0], "rope_theta": theta, **told}
    config = LlamaConfig(hidden_size=4 * head_dim, num_attention_heads=4, head_dim=head_dim, rope_parameters=given)
    frequencies, factor = ROPE_INIT_FUNCTIONS[given["rope_type"]](config, torch.device("cpu"))
    positions = torch.tensor([0, 1, 7, 300, 5000])
    angle = positions[:, None].float() * frequencies
    cos, sin = Rope(Rope.Config(theta=theta, scaling=scaling), head_dim=head_dim).table(positions[:, None])
    torch.testing.assert_close(cos, angle.cos() * factor, atol=2e-3, rtol=0)
    torch.testing.assert_close(sin, angle.sin() * factor, atol=2e-3, rtol=0)
    torch.testing.assert_close(cos[:3], angle[:3].cos() * factor, atol=2e-6, rtol=0)
    ours = scaling.build().frequencies(1.0 / theta ** (torch.arange(0, head_dim, 2).float() / head_dim), theta)
    torch.testing.assert_close(ours, frequencies, atol=0, rtol=3e-7)


def test_plain_tables_are_those_of_transformers_to_the_bit():
    pair = torch.arange(0, 64, 2, dtype=torch.float)
    angle = torch.tensor([[32_767.0]]) * (1.0 / (100_000.0 ** (pair / 64)))
    cos, _ = Rope(Rope.Config(theta=100_000.0), head_dim=64).table(torch.tensor([[32_767]]))
    assert torch.equal(cos, angle.cos())


def test_a_scaling_is_part_of_a_config():
    scaled = Rope.Config(scaling=YarnScaling.Config(factor=4.0))
    config = OmniMoeConfig(attention=Attention.Config(rope=scaled))
    again = OmniMoeConfig.from_dict(json.loads(json.dumps(config.to_dict())))
    assert again.attention.rope == scaled
    plain = config.to_dict()
    plain["attention"]["rope"]["scaling"]["type"] = "yarm"
    with pytest.raises(RegistryError, match="did you mean 'yarn'"):
        OmniMoeConfig.from_dict(plain)
    with pytest.raises(ConfigError, match="factor must be a positive number, got 0"):
        LinearScaling.Config(factor=0.0)

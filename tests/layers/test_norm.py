"""Norm banks, and Chameleon's norm of each head."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from omnimoe import ConfigError
from omnimoe.layers import BankHeadLayerNorm, BankLayerNorm, BankRMSNorm, Norm, RowLayout

ROWS = RowLayout.build(torch.tensor([[2, 0, 1, 0, 2]]), num_keys=3)
TOWERS = [(0, 1, 2), (0, 1, 0), (1, 0, 0), (0, 0, 0)]


def shaken(layer):
    for parameter in layer.parameters():
        parameter.data.normal_()
    return layer


@pytest.mark.parametrize("towers", TOWERS, ids=str)
@pytest.mark.parametrize("shape", [(5, 8), (5, 3, 8)], ids=str)
def test_rms_norm_scales_each_row_by_the_copy_of_its_key(towers, shape):
    layer, x = shaken(BankRMSNorm(towers, 8, 1e-4)), torch.randn(shape)
    y = layer(x, ROWS)
    for row, key in enumerate(ROWS.key_ids.tolist()):
        torch.testing.assert_close(y[row], F.rms_norm(x[row], (8,), layer.weight[towers[key]], 1e-4))


@pytest.mark.parametrize("towers", TOWERS, ids=str)
def test_a_scale_kept_as_a_difference_from_one_starts_at_zero_and_is_multiplied_in_float32(towers):
    layer = BankRMSNorm(towers, 8, 1e-4, offset=1.0)
    assert not layer.weight.any()
    shaken(layer)
    x = torch.randn(5, 8).bfloat16()
    y = layer(x, ROWS)
    assert y.dtype == torch.bfloat16
    for row, key in enumerate(ROWS.key_ids.tolist()):
        wanted = F.rms_norm(x[row].float(), (8,), 1 + layer.weight[towers[key]], 1e-4)
        assert torch.equal(y[row], wanted.bfloat16())


@pytest.mark.parametrize("towers", TOWERS, ids=str)
def test_a_norm_may_be_a_layer_norm(towers):
    layer = Norm.Config(form="layer", eps=1e-4, towers=towers).build(hidden_size=8, num_modalities=3)
    x = torch.randn(5, 8)
    assert isinstance(shaken(layer), BankLayerNorm)
    y = layer(x, ROWS)
    for row, key in enumerate(ROWS.key_ids.tolist()):
        copy = towers[key]
        torch.testing.assert_close(y[row], F.layer_norm(x[row], (8,), layer.weight[copy], layer.bias[copy], 1e-4))
    with pytest.raises(ConfigError, match="'batch'; known: rms, layer"):
        Norm.Config(form="batch")
    with pytest.raises(ConfigError, match=r"offset 1\.0"):
        Norm.Config(form="layer", offset=1.0)


@pytest.mark.parametrize("towers", TOWERS, ids=str)
def test_head_norm_is_a_layer_norm_of_each_head_with_its_own_scale(towers):
    layer, x = shaken(BankHeadLayerNorm(towers, 3, 4, 1e-4)), torch.randn(5, 3, 4)
    y = layer(x, ROWS)
    for row, key in enumerate(ROWS.key_ids.tolist()):
        for head in range(3):
            copy = towers[key]
            wanted = F.layer_norm(x[row, head], (4,), layer.weight[copy, head], layer.bias[copy, head], 1e-4)
            torch.testing.assert_close(y[row, head], wanted)


@pytest.mark.parametrize(
    "make", [lambda towers: BankRMSNorm(towers, 4), lambda towers: BankHeadLayerNorm(towers, 3, 4)]
)
def test_an_absent_tower_gets_a_zero_gradient_and_the_dtype_is_kept(make):
    layer = make((0, 1, 2))
    rows = RowLayout.build(torch.tensor([[2, 0, 2]]), num_keys=3)
    layer(torch.randn(3, 3, 4), rows).sum().backward()
    for parameter in layer.parameters():
        assert not parameter.grad[1].any()
    assert layer(torch.randn(3, 3, 4).bfloat16(), rows).dtype == torch.bfloat16


def test_norms_start_as_the_identity_scale():
    assert torch.equal(BankRMSNorm((0, 1), 3).weight, torch.ones(2, 3))
    layer = BankHeadLayerNorm((0, 1), 2, 3)
    assert torch.equal(layer.weight, torch.ones(2, 2, 3))
    assert torch.equal(layer.bias, torch.zeros(2, 2, 3))

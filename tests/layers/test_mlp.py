"""The feed-forward bank."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from omnimoe.layers import BankMLP


def test_a_bank_of_one_is_a_plain_swiglu_layer_bit_for_bit():
    layer, x = BankMLP(1, 8, 12), torch.randn(5, 8)
    gate, up = F.linear(x, layer.gate_up_proj[0]).chunk(2, dim=-1)
    y = layer(x, torch.tensor([5], dtype=torch.int32))
    assert torch.equal(y, F.linear(F.silu(gate) * up, layer.down_proj[0]))


@pytest.mark.parametrize("gated", [True, False])
def test_runs_meet_the_copies_they_name(gated):
    layer, x = BankMLP(2, 4, 6, "relu", gated), torch.randn(5, 4)
    y = layer(x, torch.tensor([2, 3, 5], dtype=torch.int32), [1, 0, 1])
    for row, copy in enumerate((1, 1, 0, 1, 1)):
        alone = layer(x[row : row + 1], torch.tensor([1 - copy, 1], dtype=torch.int32))
        torch.testing.assert_close(y[row], alone[0])


def test_parameters_have_the_layout_that_the_ecosystem_reads():
    shapes = {name: tuple(value.shape) for name, value in BankMLP(3, 4, 6).state_dict().items()}
    assert shapes == {"gate_up_proj": (3, 12, 4), "down_proj": (3, 4, 6)}
    assert BankMLP(3, 4, 6, gated=False).gate_up_proj.shape == (3, 6, 4)

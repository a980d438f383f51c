"""Linear banks."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from omnimoe.layers import BankLinear, RowLayout

KEYS = torch.tensor([[2, 0, 1, 0, 2]])
ROWS = RowLayout.build(KEYS, num_keys=3)


@pytest.mark.parametrize("bias", [False, True])
def test_a_bank_of_one_is_a_linear_layer_bit_for_bit(bias):
    layer, x = BankLinear((0, 0, 0), 8, 6, bias), torch.randn(5, 8)
    plain = torch.nn.Linear(8, 6, bias=bias)
    plain.weight.data = layer.weight.data[0]
    if bias:
        layer.bias.data.normal_()
        plain.bias.data = layer.bias.data[0]
    y, wanted = layer(x, ROWS), plain(x)
    assert torch.equal(y, wanted)
    y.square().sum().backward()
    wanted.square().sum().backward()
    assert torch.equal(layer.weight.grad[0], plain.weight.grad)


@pytest.mark.parametrize("towers", [(0, 1, 2), (0, 1, 0), (1, 1, 0), (0, 0, 0)], ids=str)
@pytest.mark.parametrize("bias", [False, True])
def test_each_row_meets_the_copy_of_its_key(towers, bias):
    layer, x = BankLinear(towers, 8, 6, bias), torch.randn(5, 8, requires_grad=True)
    if bias:
        layer.bias.data.normal_()
    y = layer(x, ROWS)
    for row, key in enumerate(ROWS.key_ids.tolist()):
        copy = towers[key]
        torch.testing.assert_close(y[row], F.linear(x[row], layer.weight[copy], layer.bias[copy] if bias else None))
    grads = torch.autograd.grad(y.square().sum(), [x, *layer.parameters()], retain_graph=True)
    wanted = sum(
        F.linear(x[row], layer.weight[towers[key]], layer.bias[towers[key]] if bias else None).square().sum()
        for row, key in enumerate(ROWS.key_ids.tolist())
    )
    for found, right in zip(grads, torch.autograd.grad(wanted, [x, *layer.parameters()]), strict=True):
        torch.testing.assert_close(found, right)

"""The weighted sum that ends a routed layer."""

from __future__ import annotations

import torch

from omnimoe.ops import combine


def test_each_row_collects_its_routed_rows_and_untaken_rows_are_zero():
    y, index = torch.randn(5, 3), torch.tensor([2, 0, 2, 2, 0])
    weights = torch.rand(5)
    wanted = torch.zeros(4, 3)
    for entry in range(5):
        wanted[index[entry]] += weights[entry] * y[entry]
    torch.testing.assert_close(combine(y, index, weights, 4), wanted)
    assert torch.equal(combine(y, index, weights, 4)[[1, 3]], torch.zeros(2, 3))


def test_gradcheck():
    y = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    weights = torch.rand(5, dtype=torch.float64, requires_grad=True)
    index = torch.tensor([2, 0, 2, 1, 0])
    assert torch.autograd.gradcheck(lambda *given: combine(given[0], index, given[1], 4), (y, weights))


def test_low_precision_sums_are_rounded_once():
    y = torch.full((256, 1), 1.0, dtype=torch.bfloat16)
    y[0] = 256.0
    total = combine(y, torch.zeros(256, dtype=torch.int64), torch.ones(256, dtype=torch.bfloat16), 1)
    assert total.dtype == torch.bfloat16
    # 256 + 255 ones: added one by one in bfloat16 nothing would ever be added
    assert total.item() == torch.tensor(511.0).bfloat16().item()


def test_nothing_routed_gives_zeros_with_a_graph():
    y = torch.randn(0, 3, requires_grad=True)
    weights = torch.rand(0, requires_grad=True)
    out = combine(y, torch.zeros(0, dtype=torch.int64), weights, 2)
    assert torch.equal(out, torch.zeros(2, 3))
    out.sum().backward()
    assert weights.grad is not None

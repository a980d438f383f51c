"""The gather whose gradient is a gather, with and without padding."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from omnimoe.ops import permute


def layout(valid: torch.Tensor, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """A shuffled order of the valid positions and its inverse."""
    kept = valid.nonzero().squeeze(1)
    order = kept[torch.randperm(len(kept), generator=torch.Generator().manual_seed(seed))]
    inverse = torch.zeros(len(valid), dtype=torch.int64)
    inverse[order] = torch.arange(len(order))
    return order, inverse


@settings(max_examples=20)
@given(pattern=st.lists(st.booleans(), min_size=1, max_size=12).filter(any), seed=st.integers(0, 99))
def test_rows_and_back_restores_what_is_valid_and_zeroes_the_rest(pattern, seed):
    valid = torch.tensor(pattern)
    order, inverse = layout(valid, seed)
    x = torch.randn(len(pattern), 2, 3)
    rows = permute(x, order, inverse, valid)
    assert torch.equal(rows, x[order])
    back = permute(rows, inverse, order, valid)
    assert torch.equal(back, x * valid.view(-1, 1, 1))


def test_gradcheck_both_ways_with_padding():
    valid = torch.tensor([True, False, True, True, False])
    order, inverse = layout(valid)
    x = torch.randn(5, 2, dtype=torch.float64, requires_grad=True)
    rows = torch.randn(3, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda given_: permute(given_, order, inverse, valid), (x,))
    assert torch.autograd.gradcheck(lambda given_: permute(given_, inverse, order, valid), (rows,))


def test_positions_that_were_not_taken_get_a_zero_gradient():
    valid = torch.tensor([True, False, True])
    order, inverse = layout(valid)
    x = torch.randn(3, 2, requires_grad=True)
    permute(x, order, inverse, valid).backward(torch.full((2, 2), 3.0))
    assert torch.equal(x.grad, torch.tensor([[3.0, 3.0], [0.0, 0.0], [3.0, 3.0]]))


def test_integers_and_the_input_itself_survive():
    valid = torch.tensor([True, False, True])
    order, inverse = layout(valid)
    rows = torch.tensor([7, 9])
    assert permute(rows, inverse, order, valid).tolist() in ([7, 0, 9], [9, 0, 7])
    assert rows.tolist() == [7, 9]

from __future__ import annotations

import math

import pytest
import torch

from omnimoe.tokenizers.fsq import FSQ

LEVELS = [(8, 5, 5, 5), (2, 2), (3,), (7, 4, 6), (5, 5, 5, 5, 5)]


@pytest.mark.parametrize("levels", LEVELS)
def test_ids_and_codes_are_exact_inverses(levels):
    fsq = FSQ(levels)
    assert fsq.num_codes == math.prod(levels)
    ids = torch.arange(fsq.num_codes)
    codes = fsq.ids_to_codes(ids)
    assert codes.shape == (fsq.num_codes, len(levels))
    assert codes.abs().max() <= 1
    assert len(codes.unique(dim=0)) == fsq.num_codes
    assert torch.equal(fsq.codes_to_ids(codes), ids)


@pytest.mark.parametrize("levels", LEVELS)
def test_every_code_can_be_reached_and_no_other(levels):
    fsq = FSQ(levels)
    z = 4 * torch.randn(200_000, len(levels), generator=torch.Generator().manual_seed(0))
    codes, ids = fsq(z)
    for channel, level in enumerate(levels):
        assert len(codes[:, channel].unique()) == level
    assert ids.min() >= 0
    assert ids.max() < fsq.num_codes
    assert torch.equal(fsq.ids_to_codes(ids), codes)


def test_zero_gives_the_middle_code():
    codes, _ = FSQ((8, 5, 4, 3))(torch.zeros(1, 4))
    assert codes.tolist() == [[0.0, 0.0, 0.0, 0.0]]


def test_extreme_inputs_stay_in_range():
    fsq = FSQ((8, 5))
    _, ids = fsq(torch.tensor([[1e9, 1e9], [-1e9, -1e9]]))
    assert ids.tolist() == [fsq.num_codes - 1, 0]


def test_the_gradient_is_that_of_the_bound():
    fsq = FSQ((8, 5, 5, 5))
    z = torch.randn(16, 4, generator=torch.Generator().manual_seed(0), requires_grad=True)
    through = torch.autograd.grad(fsq(z)[0].sum(), z)[0]
    smooth = torch.autograd.grad((fsq.bound(z) / fsq.half_width).sum(), z)[0]
    torch.testing.assert_close(through, smooth)
    assert (through > 0).all()


def test_autocast_does_not_change_ids():
    fsq = FSQ((8, 5, 5, 5))
    z = torch.randn(4096, 4, generator=torch.Generator().manual_seed(0))
    expected = fsq(z)[1]
    with torch.autocast("cpu", torch.bfloat16):
        codes, ids = fsq(z)
    assert codes.dtype == torch.float32
    assert torch.equal(ids, expected)


def test_an_id_out_of_range_is_refused():
    with pytest.raises(ValueError, match=r"0\.\.999, got 0\.\.1000"):
        FSQ((8, 5, 5, 5)).ids_to_codes(torch.tensor([0, 1000]))


@pytest.mark.parametrize("levels", [(), (8, 1), (8, 5.0)])
def test_bad_levels_are_refused(levels):
    with pytest.raises(ValueError, match="2 or more"):
        FSQ(levels)

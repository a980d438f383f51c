"""Rotary positions as an op: a rotation by complex numbers, and its relative nature."""

from __future__ import annotations

import pytest
import torch

from omnimoe.ops import rope


def angles(rows: int, half: int) -> torch.Tensor:
    return torch.rand(rows, half) * 6


def test_pairs_are_rotated_as_complex_numbers():
    x, angle = torch.randn(5, 3, 8), angles(5, 4)
    y = rope(x, angle.cos(), angle.sin())
    turned = torch.complex(x[..., :4], x[..., 4:]) * torch.polar(torch.ones(5, 1, 4), angle.unsqueeze(1))
    torch.testing.assert_close(y, torch.cat((turned.real, turned.imag), -1))


def test_angle_zero_changes_no_bit_and_length_is_kept():
    x, angle = torch.randn(5, 2, 6), angles(5, 3)
    assert torch.equal(rope(x, torch.ones(5, 3), torch.zeros(5, 3)), x)
    torch.testing.assert_close(rope(x, angle.cos(), angle.sin()).norm(dim=-1), x.norm(dim=-1))


def test_gradcheck():
    x = torch.randn(3, 2, 4, dtype=torch.float64, requires_grad=True)
    angle = angles(3, 2)
    assert torch.autograd.gradcheck(lambda given: rope(given, angle.cos().double(), angle.sin().double()), (x,))


def test_the_dtype_of_the_rows_is_kept():
    angle = angles(2, 2)
    assert rope(torch.randn(2, 1, 4).bfloat16(), angle.cos(), angle.sin()).dtype == torch.bfloat16


@pytest.mark.parametrize(("rows", "half"), [(4, 2), (3, 3)])
def test_a_table_of_another_shape_is_refused(rows, half):
    with pytest.raises(ValueError, match="cos and sin must be \\(3, 2\\)"):
        rope(torch.randn(3, 1, 4), torch.ones(rows, half), torch.ones(rows, half))

"""Rotary positions as an op: a rotation by complex numbers, and its relative nature."""

from __future__ import annotations

import pytest
import torch

from omnimoe.ops import BackendError, backend, rope
from omnimoe.ops.rope import reference


@pytest.fixture(params=["reference", "cpp"], autouse=True)
def through(request):
    """Runs every test within each backend."""
    if request.param == "cpp":
        request.getfixturevalue("compiled")
    with backend(request.param):
        yield request.param


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


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("half", [1, 3, 20, 40])
def test_values_and_gradients_are_the_definitions(dtype, half):
    x = torch.randn(70, 3, 2 * half + 4)[:, 1:, 2:-2].to(dtype).requires_grad_()
    cos, sin = (
        part.to(torch.promote_types(dtype, torch.float32)) for part in (angles(70, half).cos(), angles(70, half).sin())
    )
    exact, grad = x.detach().double().requires_grad_(), torch.randn(70, 2, 2 * half).to(dtype)
    y, wanted = rope(x, cos, sin), reference.rope(exact, cos.to(dtype).double(), sin.to(dtype).double())
    tolerance = {torch.float64: 1e-14, torch.float32: 1e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}[dtype]
    found, right = torch.autograd.grad(y, x, grad)[0], torch.autograd.grad(wanted, exact, grad.double())[0]
    for one, other in ((y, wanted), (found, right)):
        assert (one.double() - other).norm() <= tolerance * other.norm()


def test_a_table_may_have_a_gradient(through):
    x, angle = torch.randn(3, 2, 4, dtype=torch.float64), angles(3, 2).double()
    tables = angle.cos().requires_grad_(), angle.sin().requires_grad_()
    if through == "cpp":
        with pytest.raises(BackendError, match="a table needs a gradient"):
            rope(x, *tables)
    else:
        assert torch.autograd.gradcheck(lambda *given: rope(x, *given), tables)


def test_no_rows():
    assert rope(torch.randn(0, 2, 4), torch.ones(0, 2), torch.zeros(0, 2)).shape == (0, 2, 4)

"""The grouped product: every implementation against a loop, forward and backward, and the traps of its peers."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from omnimoe.ops import grouped_mm, missing_kernels
from omnimoe.ops.grouped_mm import cpp, native, reference, slices

IMPLEMENTATIONS = {
    "slices": slices.grouped_mm,
    "reference": reference.grouped_mm,
    "native": native.grouped_mm,
    "cpp": cpp.grouped_mm,
}
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 8e-3, torch.float16: 2e-3}


@pytest.fixture(autouse=True)
def _compiled(request: pytest.FixtureRequest) -> None:
    if getattr(request.node, "callspec", None) and request.node.callspec.params.get("name") == "cpp":
        request.getfixturevalue("compiled")


def ends(*sizes: int) -> torch.Tensor:
    return torch.tensor(sizes).cumsum(0).to(torch.int32)


def loop(x, weight, offsets, bias=None):
    """A matrix a row, in plain Python: what the product means."""
    found, bounds = [], [0, *offsets.tolist()]
    for row in range(len(x)):
        group = next((g for g in range(len(offsets)) if bounds[g] <= row < bounds[g + 1]), None)
        y = x.new_zeros(weight.shape[1]) if group is None else weight[group] @ x[row]
        found.append(y if group is None or bias is None else y + bias[group])
    return torch.stack(found) if found else x.new_zeros(0, weight.shape[1])


def distance(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """Relative Frobenius error; NaN never passes."""
    error = (found.double() - wanted.double()).norm() / wanted.double().norm().clamp_min(1e-30)
    return error.item() if error.isfinite() else float("inf")


def runs(name: str, dtype: torch.dtype) -> bool:
    """torch's own product takes no float64."""
    return not (name == "native" and dtype is torch.float64)


CASES = [
    pytest.param(name, dtype, id=f"{name}-{str(dtype).removeprefix('torch.')}")
    for name in IMPLEMENTATIONS
    for dtype in TOLERANCE
    if runs(name, dtype)
]


@pytest.mark.parametrize(("name", "dtype"), CASES)
@pytest.mark.parametrize("sizes", [(5, 0, 7, 3), (16,), (0, 0, 4), (1, 1, 1), (0,)], ids=str)
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("beyond", [0, 2])
def test_every_implementation_gives_the_loops_values_and_gradients(name, dtype, sizes, with_bias, beyond):
    offsets, rows, groups = ends(*sizes), sum(sizes) + beyond, len(sizes)
    x, weight, bias = torch.randn(rows, 16), torch.randn(groups, 24, 16), torch.randn(groups, 24)
    given_ = [part.to(dtype).requires_grad_() for part in (x, weight, bias)]
    wanted_ = [part.detach().double().requires_grad_() for part in given_]
    grad = torch.randn(rows, 24).to(dtype)

    y = IMPLEMENTATIONS[name](given_[0], given_[1], offsets, given_[2] if with_bias else None)
    wanted = loop(wanted_[0], wanted_[1], offsets, wanted_[2] if with_bias else None)
    y.backward(grad)
    if wanted.requires_grad:
        wanted.backward(grad.double())

    assert y.dtype == dtype
    assert y.shape == wanted.shape
    if rows:
        assert distance(y, wanted) <= TOLERANCE[dtype] or (wanted.norm() == 0 and y.norm() == 0)
    for index in range(3 if with_bias else 2):
        found, right = given_[index].grad, wanted_[index].grad
        assert found is not None
        right = torch.zeros_like(found) if right is None else right
        assert distance(found, right) <= 2 * TOLERANCE[dtype] or (right.norm() == 0 and found.norm() == 0)


@pytest.mark.parametrize("name", ["slices", "reference", "cpp"])
def test_odd_widths_are_no_error(name):
    x, weight = torch.randn(11, 7), torch.randn(3, 5, 7)
    offsets = ends(4, 0, 7)
    assert distance(IMPLEMENTATIONS[name](x, weight, offsets), loop(x, weight, offsets)) < 2e-6


@settings(max_examples=15)
@given(
    sizes=st.lists(st.integers(0, 9), min_size=1, max_size=6),
    width=st.integers(1, 9),
    out=st.integers(1, 9),
    beyond=st.integers(0, 3),
)
def test_slices_equal_the_loop_at_any_shape(sizes, width, out, beyond):
    generator = torch.Generator().manual_seed(len(sizes))
    x = torch.randn(sum(sizes) + beyond, width, dtype=torch.float64, generator=generator)
    weight = torch.randn(len(sizes), out, width, dtype=torch.float64, generator=generator)
    offsets = ends(*sizes)
    torch.testing.assert_close(slices.grouped_mm(x, weight, offsets), loop(x, weight, offsets))
    torch.testing.assert_close(reference.grouped_mm(x, weight, offsets), loop(x, weight, offsets))


@pytest.mark.parametrize("name", ["slices", "reference", "cpp"])
def test_gradcheck_in_float64(name):
    x = torch.randn(9, 3, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(4, 5, 3, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(4, 5, dtype=torch.float64, requires_grad=True)
    offsets = ends(2, 0, 4, 1)
    assert torch.autograd.gradcheck(
        lambda *given_: IMPLEMENTATIONS[name](*given_[:2], offsets, given_[2]), (x, weight, bias)
    )


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_rows_past_the_end_are_zero_and_leak_nothing_even_if_they_hold_nan(name):
    x = torch.randn(8, 16)
    x[5:] = float("nan")
    x.requires_grad_()
    weight = torch.randn(2, 8, 16, requires_grad=True)
    y = IMPLEMENTATIONS[name](x, weight, ends(3, 2))
    assert torch.equal(y[5:], torch.zeros(3, 8))
    y.backward(torch.ones_like(y))
    assert weight.grad.isfinite().all()
    assert torch.equal(x.grad[5:], torch.zeros(3, 16))


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_a_group_without_rows_gets_a_zero_gradient(name):
    x, weight = torch.randn(6, 16), torch.randn(3, 8, 16, requires_grad=True)
    bias = torch.randn(3, 8, requires_grad=True)
    y = IMPLEMENTATIONS[name](x, weight, ends(4, 0, 2), bias)
    y.square().sum().backward()
    assert torch.equal(weight.grad[1], torch.zeros(8, 16))
    assert torch.equal(bias.grad[1], torch.zeros(8))
    assert weight.grad[[0, 2]].abs().sum() > 0


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_an_expanded_gradient_is_accepted(name):
    x, weight = torch.randn(6, 16, requires_grad=True), torch.randn(2, 8, 16, requires_grad=True)
    IMPLEMENTATIONS[name](x, weight, ends(4, 2)).sum().backward()
    torch.testing.assert_close(x.grad[0], weight.detach()[0].sum(0))


@pytest.mark.parametrize("name", ["slices", "reference", "cpp"])
def test_strided_input_is_accepted(name):
    x, weight = torch.randn(16, 12).t()[:, ::2], torch.randn(2, 6, 9).transpose(1, 2)
    offsets = ends(5, 7)
    x = x[:, :6]
    torch.testing.assert_close(IMPLEMENTATIONS[name](x, weight[:, :, :6], offsets), loop(x, weight[:, :, :6], offsets))


def test_the_public_function_takes_slices_on_the_cpu_and_follows_autocast():
    x, weight, bias, offsets = torch.randn(6, 16), torch.randn(2, 8, 16), torch.randn(2, 8), ends(4, 2)
    assert torch.equal(grouped_mm(x, weight, offsets, bias), slices.grouped_mm(x, weight, offsets, bias))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = grouped_mm(x, weight, offsets, bias)
    assert y.dtype == torch.bfloat16
    assert distance(y, loop(x, weight, offsets, bias)) < 8e-3


def test_gradients_through_autocast_have_the_dtype_of_the_parameters():
    x, weight = torch.randn(6, 16, requires_grad=True), torch.randn(2, 8, 16, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        grouped_mm(x, weight, ends(4, 2)).float().square().sum().backward()
    assert x.grad.dtype == weight.grad.dtype == torch.float32


@pytest.mark.parametrize(
    ("dtype", "width", "out", "handled"),
    [
        (torch.float32, 8, 4, True),
        (torch.float32, 18, 4, False),
        (torch.bfloat16, 8, 16, True),
        (torch.bfloat16, 8, 12, False),
        (torch.float64, 8, 8, False),
    ],
)
def test_torchs_own_product_is_asked_only_for_what_it_takes(dtype, width, out, handled):
    x, weight = torch.randn(4, width, dtype=dtype), torch.randn(2, out, width, dtype=dtype)
    assert (not native.why_not(x, weight)) == handled
    if handled:
        assert distance(native.grouped_mm(x, weight, ends(1, 3)), loop(x, weight, ends(1, 3))) < 8e-3


@pytest.mark.gpu
@pytest.mark.parametrize("width", [16, 18])
def test_the_public_function_runs_on_cuda(width):
    x, weight = torch.randn(6, width, device="cuda"), torch.randn(2, 8, width, device="cuda")
    y = grouped_mm(x, weight, ends(4, 2).cuda())
    assert distance(y.cpu(), loop(x.cpu(), weight.cpu(), ends(4, 2))) < 1e-2


def test_one_group_equals_a_linear_layer_bit_for_bit():
    x, weight = torch.randn(9, 16), torch.randn(8, 16)
    y = grouped_mm(x, weight.unsqueeze(0), ends(9))
    assert torch.equal(y, torch.nn.functional.linear(x, weight))


@pytest.mark.skipif(missing_kernels() != "", reason="no CPU kernels")
@pytest.mark.parametrize("width", [352, 512, 1030, 1408, 2050])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_a_decoded_row_is_what_it_is_among_others(dtype, width):
    # weights are read in another order for one or two short rows, but every sum is taken in the same
    x, weight = torch.randn(6, width).to(dtype), torch.randn(1, 37, width).to(dtype)
    few = [cpp.grouped_mm(x[:count], weight, torch.tensor([count], dtype=torch.int32)) for count in range(1, 7)]
    for y in few:
        assert torch.equal(y, few[-1][: len(y)])


@pytest.mark.parametrize("offsets", [(4, 3), (4, 7), (-1, 6)], ids=str)
def test_offsets_that_decrease_or_pass_the_rows_are_refused(offsets):
    with pytest.raises(ValueError, match="offsets must not decrease nor pass the 6 rows"):
        grouped_mm(torch.randn(6, 4), torch.randn(2, 3, 4), torch.tensor(offsets, dtype=torch.int32))


@pytest.mark.parametrize(
    ("x", "weight", "offsets", "bias", "message"),
    [
        ((6, 4), (2, 3, 5), ends(4, 2), None, "x must be (R, D) and weight (G, F, D)"),
        ((6, 4, 1), (2, 3, 4), ends(4, 2), None, "x must be (R, D)"),
        ((6, 4), (2, 3, 4), ends(4, 2).long(), None, "int32, one end a group"),
        ((6, 4), (2, 3, 4), ends(4, 1, 1), None, "offsets must be (2,) int32"),
        ((6, 4), (2, 3, 4), ends(4, 2), (3,), "bias must be (2, 3)"),
    ],
)
def test_wrong_shapes_are_refused_with_the_value(x, weight, offsets, bias, message):
    with pytest.raises(ValueError) as caught:  # noqa: PT011 - the message is compared below
        grouped_mm(torch.randn(x), torch.randn(weight), offsets, None if bias is None else torch.randn(bias))
    assert message in str(caught.value)


def test_mixed_dtypes_are_refused_outside_autocast():
    with pytest.raises(ValueError, match="must share a dtype"):
        grouped_mm(torch.randn(6, 4).bfloat16(), torch.randn(2, 3, 4), ends(4, 2))


def test_a_second_derivative_is_refused_rather_than_wrong():
    x, weight = torch.randn(4, 8, requires_grad=True), torch.randn(2, 8, 8, requires_grad=True)
    (grad,) = torch.autograd.grad(grouped_mm(x, weight, ends(2, 2)).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()

"""The root-mean-square norm with a bank of scales: both implementations against the formula."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from omnimoe.ops import rms_norm
from omnimoe.ops.rms_norm import cpp, reference, slices

IMPLEMENTATIONS = {"slices": slices.rms_norm, "reference": reference.rms_norm, "cpp": cpp.rms_norm}


@pytest.fixture(autouse=True)
def _compiled(request: pytest.FixtureRequest) -> None:
    if getattr(request.node, "callspec", None) and request.node.callspec.params.get("name") == "cpp":
        request.getfixturevalue("compiled")


def ends(*sizes: int) -> torch.Tensor:
    return torch.tensor(sizes).cumsum(0).to(torch.int32)


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
@pytest.mark.parametrize("shape", [(7, 6), (7, 3, 5)], ids=str)
def test_the_norm_is_torchs_with_the_scale_of_the_group(name, shape):
    x, weight = torch.randn(shape, dtype=torch.float64), torch.randn(3, shape[-1], dtype=torch.float64)
    y = IMPLEMENTATIONS[name](x, weight, ends(3, 0, 4), 1e-5)
    first = torch.nn.functional.rms_norm(x[:3], shape[-1:], weight[0], 1e-5)
    last = torch.nn.functional.rms_norm(x[3:], shape[-1:], weight[2], 1e-5)
    torch.testing.assert_close(y, torch.cat((first, last)))


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
@pytest.mark.parametrize("groups", [None, (2, 0, 3), (5,), (1, 2)], ids=str)
@pytest.mark.parametrize("shape", [(5, 4), (5, 2, 3)], ids=str)
def test_gradcheck_in_float64(name, groups, shape):
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    count = 1 if groups is None else len(groups)
    weight = torch.randn(count, shape[-1], dtype=torch.float64, requires_grad=True)
    offsets = None if groups is None else ends(*groups)
    assert torch.autograd.gradcheck(lambda *given_: IMPLEMENTATIONS[name](*given_, offsets, 1e-5), (x, weight))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_all_are_equal_forward_and_backward(compiled, dtype):
    grad, results = torch.randn(9, 16).to(dtype), []
    x, weight = torch.randn(9, 16).to(dtype), torch.randn(4, 16)
    for implementation in IMPLEMENTATIONS.values():
        given_ = x.clone().requires_grad_(), weight.clone().requires_grad_()
        y = implementation(*given_, ends(3, 0, 5, 1), 1e-6)
        y.backward(grad)
        results.append((y.detach(), given_[0].grad, given_[1].grad))
        assert y.dtype == dtype
        assert given_[1].grad.dtype == torch.float32
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 4e-2, torch.float16: 5e-3}[dtype]
    for parts in zip(*results, strict=True):
        for found in parts[1:]:
            torch.testing.assert_close(found, parts[0], atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_rows_past_the_end_are_zero(name):
    x = torch.randn(6, 4, requires_grad=True)
    weight = torch.randn(2, 4, requires_grad=True)
    y = IMPLEMENTATIONS[name](x, weight, ends(1, 3), 1e-5)
    y.square().sum().backward()
    assert torch.equal(y[4:], torch.zeros(2, 4))
    assert torch.equal(x.grad[4:], torch.zeros(2, 4))


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_no_rows_keep_the_graph_with_zero_gradients(name):
    x, weight = torch.randn(0, 4, requires_grad=True), torch.randn(2, 4, requires_grad=True)
    IMPLEMENTATIONS[name](x, weight, ends(0, 0), 1e-5).sum().backward()
    assert torch.equal(weight.grad, torch.zeros(2, 4))


def test_statistics_are_taken_in_float32():
    x = torch.full((1, 4), 300.0, dtype=torch.float16)
    torch.testing.assert_close(rms_norm(x, torch.ones(1, 4)), torch.ones(1, 4, dtype=torch.float16))


def test_a_zero_row_stays_zero_with_finite_gradients():
    x = torch.zeros(2, 4, requires_grad=True)
    rms_norm(x, torch.ones(1, 4)).sum().backward()
    assert x.grad.isfinite().all()


def test_the_input_is_left_alone():
    x = torch.randn(3, 4)
    before = x.clone()
    rms_norm(x, torch.randn(1, 4))
    assert torch.equal(x, before)


def test_wrong_widths_and_missing_offsets_are_refused():
    with pytest.raises(ValueError, match="weight must be \\(G, 4\\)"):
        rms_norm(torch.randn(3, 4), torch.randn(1, 5))
    with pytest.raises(ValueError, match="2 groups need offsets"):
        rms_norm(torch.randn(3, 4), torch.randn(2, 4))


@pytest.mark.parametrize("offsets", [(2, 1), (2, 4)], ids=str)
def test_bad_offsets_are_refused(offsets):
    with pytest.raises(ValueError, match="must not decrease nor pass"):
        rms_norm(torch.randn(3, 4), torch.randn(2, 4), torch.tensor(offsets, dtype=torch.int32))


@settings(max_examples=25)
@given(
    sizes=st.lists(st.integers(0, 300), min_size=1, max_size=4),
    heads=st.integers(0, 3),
    width=st.integers(1, 90),
    beyond=st.integers(0, 2),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16]),
)
def test_compiled_kernels_at_drawn_sizes(compiled, sizes, heads, width, beyond, dtype):
    generator = torch.Generator().manual_seed(0)
    rows = sum(sizes) + beyond
    shape = (rows, heads, width) if heads else (rows, width)
    x, grad = (torch.randn(shape, generator=generator).to(dtype) for _ in range(2))
    weight = torch.rand(len(sizes), width, generator=generator).to(dtype)
    given_ = x.clone().requires_grad_(), weight.clone().requires_grad_()
    exact = x.double().requires_grad_(), weight.double().requires_grad_()
    y, wanted = cpp.rms_norm(*given_, ends(*sizes), 1e-6), reference.rms_norm(*exact, ends(*sizes), 1e-6)
    found = y, *torch.autograd.grad(y, given_, grad)
    right = wanted, *torch.autograd.grad(wanted, exact, grad.double())
    tolerance = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 8e-3}[dtype]
    for one, other in zip(found, right, strict=True):
        # with one column the gradient is what eps leaves of it
        assert (one.double() - other).norm() <= tolerance * (
            other.norm() + (1 if width < 3 else 0) * grad.double().norm()
        )


def test_strided_rows_are_read_as_they_lie_and_threads_change_no_bit(compiled):
    x = torch.randn(500, 3, 24)[:, :2, 4:20].requires_grad_()
    weight, offsets = torch.rand(3, 16, requires_grad=True), ends(190, 0, 300)

    def results(threads):
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            y = cpp.rms_norm(x, weight, offsets, 1e-5)
            return [y, *torch.autograd.grad(y.square().sum(), (x, weight))]
        finally:
            torch.set_num_threads(before)

    one, three = results(1), results(3)
    assert all(torch.equal(*pair) for pair in zip(one, three, strict=True))
    torch.testing.assert_close(one[0], reference.rms_norm(x, weight, offsets, 1e-5))

"""What goes wrong with ``torch.nn.functional.grouped_mm`` on a CPU, by name: torch's op fails, ours does not.

What was found holds for PyTorch 2.11 to 2.14. A later one may have mended it; then our half is asserted alone. Traps
that only a GPU shows are not here: a loop with a synchronisation before Hopper, gradients of empty groups on Blackwell.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress

import pytest
import torch
import torch.nn.functional as F
from packaging.version import Version

from omnimoe.ops import backend, experts_mlp, grouped_mm, route_plan

TORCH_IS_KNOWN = Version("2.11") <= Version(torch.__version__.partition("+")[0]) < Version("2.15")


@pytest.fixture(params=["reference", "torch", "cpp"])
def through(request):
    """Runs the test within one backend."""
    if request.param == "cpp":
        request.getfixturevalue("compiled")
    with backend(request.param):
        yield request.param


@contextmanager
def torch_raises(message: str) -> Iterator[None]:
    """What PyTorch refuses, in the versions that were looked at."""
    if TORCH_IS_KNOWN:
        with pytest.raises(Exception, match=message):
            yield
        return
    with suppress(Exception):  # a later version may raise anything, or nothing
        yield


@pytest.fixture
def fresh_memory_is_nan() -> Iterator[None]:
    """PyTorch fills what its ops allocate with NaN, so that what they leave as it was is seen."""
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def ends(*sizes: int) -> torch.Tensor:
    return torch.tensor(sizes).cumsum(0).to(torch.int32)


def theirs(x: torch.Tensor, weight: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
    return F.grouped_mm(x, weight.transpose(1, 2), offs=offsets)


def operands(rows: int = 6, depth: int = 16, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(rows, depth).to(dtype), torch.randn(2, 8, depth).to(dtype)


def wanted(x: torch.Tensor, weight: torch.Tensor, *sizes: int) -> torch.Tensor:
    parts = [part @ matrix.t() for part, matrix in zip(x[: sum(sizes)].split(sizes), weight, strict=True)]
    return torch.cat([*parts, x.new_zeros(len(x) - sum(sizes), weight.shape[1])])


def test_float64_is_refused_so_gradcheck_is(through):
    x, weight = (part.requires_grad_() for part in operands(4, 3, torch.float64))
    with torch_raises("Expected mat_a to be"):
        theirs(x, weight, ends(3, 1))
    assert torch.autograd.gradcheck(lambda *given: grouped_mm(*given, ends(3, 1)), (x, weight))


def test_float32_does_not_compile(compiled):
    x, weight = operands()
    torch._dynamo.reset()
    with torch_raises("fake tensor"):
        torch.compile(theirs, fullgraph=True, backend="eager")(x, weight, ends(4, 2))
    torch._dynamo.reset()
    y = torch.compile(grouped_mm, fullgraph=True, backend="eager")(x, weight, ends(4, 2))
    torch.testing.assert_close(y, wanted(x, weight, 4, 2))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_that_are_no_multiple_of_16_bytes_are_refused(through, dtype):
    x, weight = operands(depth=19, dtype=dtype)
    with torch_raises("16 bytes"):
        theirs(x, weight, ends(4, 2))
    torch.testing.assert_close(grouped_mm(x, weight, ends(4, 2)), wanted(x, weight, 4, 2), rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("kind", ["every other column", "one row for all", "a column cut off"])
def test_strided_rows_are_refused(through, kind):
    _, weight = operands()
    x = {
        "every other column": torch.randn(6, 32)[:, ::2],
        "one row for all": torch.randn(1, 16).expand(6, 16),
        "a column cut off": torch.randn(6, 17)[:, 1:],
    }[kind]
    with torch_raises("strides"):
        theirs(x, weight, ends(4, 2))
    torch.testing.assert_close(grouped_mm(x, weight, ends(4, 2)), wanted(x, weight, 4, 2))


def test_the_gradient_of_a_sum_is_refused(through):
    x, weight = (part.requires_grad_() for part in operands())
    with torch_raises("Invalid strides"):
        theirs(x, weight, ends(4, 2)).sum().backward()
    found = torch.autograd.grad(grouped_mm(x, weight, ends(4, 2)).sum(), (x, weight))
    right = torch.autograd.grad(wanted(x, weight, 4, 2).sum(), (x, weight))
    torch.testing.assert_close(found, right)


@pytest.mark.parametrize("offsets", [(4, 7), (5, 2)], ids=["past the rows", "decreasing"])
def test_bad_offsets_are_taken_silently(compiled, offsets):
    x, weight = operands()
    bad = torch.tensor(offsets, dtype=torch.int32)
    if TORCH_IS_KNOWN:
        assert theirs(x, weight, bad).shape == (6, 8)
    for name in ("torch", "cpp"):  # the reference never reads offsets on the host
        with backend(name), pytest.raises(ValueError, match="offsets must not decrease nor pass the 6 rows"):
            grouped_mm(x, weight, bad)


def test_rows_past_the_last_offset_are_left_as_they_were(through, fresh_memory_is_nan):
    x, weight = operands()
    if TORCH_IS_KNOWN:
        assert theirs(x, weight, ends(2, 2))[4:].isnan().all()
    assert torch.equal(grouped_mm(x, weight, ends(2, 2))[4:], torch.zeros(2, 8))


def test_so_are_their_gradients(through, fresh_memory_is_nan):
    x, weight = (part.requires_grad_() for part in operands())
    grad = torch.randn(6, 8)
    if TORCH_IS_KNOWN:
        (found,) = torch.autograd.grad(theirs(x, weight, ends(2, 2)), x, grad)
        assert found[4:].isnan().all()
    found, of_weight = torch.autograd.grad(grouped_mm(x, weight, ends(2, 2)), (x, weight), grad)
    assert torch.equal(found[4:], torch.zeros(2, 16))
    assert of_weight.isfinite().all()


def test_a_zero_weight_does_not_hide_them(through, fresh_memory_is_nan):
    """What becomes of routed rows that expert parallelism leaves out: their ids are past the last expert."""
    x, into, down = torch.randn(3, 16), torch.randn(2, 8, 16), torch.randn(2, 16, 4)
    ids = torch.tensor([[0, 1], [2, 0], [2, 2]])
    weights = torch.where(ids < 2, 0.5, 0.0)
    plan = route_plan(ids, 2)
    if TORCH_IS_KNOWN:
        gate, up = theirs(x[plan.token_index], into, plan.offsets).chunk(2, dim=1)
        rows = theirs(F.silu(gate) * up, down, plan.offsets) * weights.reshape(-1)[plan.order].unsqueeze(1)
        assert torch.zeros(3, 16).index_add(0, plan.token_index, rows).isnan().any()
    given = (x.requires_grad_(), into.requires_grad_(), down.requires_grad_())
    y = experts_mlp(*given, plan.offsets, "silu", plan.token_index, weights.reshape(-1)[plan.order])
    assert y.isfinite().all()
    assert torch.equal(y[2], torch.zeros(16))
    found = torch.autograd.grad(y.square().sum(), given)
    assert all(part.isfinite().all() for part in found)
    assert torch.equal(found[0][2], torch.zeros(16))


def test_what_such_rows_hold_reaches_nothing(through):
    x, weight = operands()
    x[4:], grad = float("nan"), torch.randn(6, 8)
    grad[4:] = float("inf")
    x, weight = x.requires_grad_(), weight.requires_grad_()
    y = grouped_mm(x, weight, ends(2, 2))
    assert torch.equal(y[4:], torch.zeros(2, 8))
    of_x, of_weight = torch.autograd.grad(y, (x, weight), grad)
    assert of_weight.isfinite().all()
    assert torch.equal(of_x[4:], torch.zeros(2, 16))


def test_a_group_without_rows_has_a_gradient_of_zeros(through, fresh_memory_is_nan):
    x, weight = (part.requires_grad_() for part in operands())
    bias = torch.randn(2, 8, requires_grad=True)
    y = grouped_mm(x, weight, ends(6, 0), bias)
    of_weight, of_bias = torch.autograd.grad(y, (weight, bias), torch.randn(6, 8))
    assert torch.equal(of_weight[1], torch.zeros(8, 16))
    assert torch.equal(of_bias[1], torch.zeros(8))


@pytest.mark.parametrize("routed", [False, True])
def test_no_rows_at_all_still_give_gradients(through, routed):
    """A rank that no token came to must take part in the step."""
    x, into, down = torch.randn(0, 4), torch.randn(2, 6, 4), torch.randn(2, 4, 3)
    given = tuple(part.requires_grad_() for part in (x, into, down))
    index = torch.zeros(0, dtype=torch.int64) if routed else None
    y = experts_mlp(*given, ends(0, 0), "silu", index, torch.zeros(0) if routed else None)
    assert y.shape == (0, 4)
    for part, found in zip(given, torch.autograd.grad(y.sum(), given), strict=True):
        assert torch.equal(found, torch.zeros_like(part))


def test_a_bias_is_refused(through):
    x, weight = operands()
    bias = torch.randn(2, 8)
    with torch_raises("Bias not supported"):
        F.grouped_mm(x, weight.transpose(1, 2), offs=ends(4, 2), bias=bias)
    right = wanted(x, weight, 4, 2) + bias[torch.tensor([0, 0, 0, 0, 1, 1])]
    torch.testing.assert_close(grouped_mm(x, weight, ends(4, 2), bias), right)


def test_autocast_is_ignored_or_refused(through):
    x, weight = operands()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        if TORCH_IS_KNOWN:
            assert theirs(x, weight, ends(4, 2)).dtype == torch.float32
        with torch_raises("same dtype"):
            theirs(x.bfloat16(), weight, ends(4, 2))
        assert grouped_mm(x, weight, ends(4, 2)).dtype == torch.bfloat16
        assert grouped_mm(x.bfloat16(), weight, ends(4, 2)).dtype == torch.bfloat16


def test_mixed_dtypes_are_named_rather_than_met_deep_inside(through):
    x, weight = operands()
    with pytest.raises(ValueError, match="must share a dtype, got torch.bfloat16 and torch.float32; cast one of them"):
        grouped_mm(x.bfloat16(), weight, ends(4, 2))

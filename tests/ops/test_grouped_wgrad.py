"""The gradient of a bank: every implementation against a loop over rows in float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from omnimoe.ops import backend, grouped_wgrad

TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 8e-3, torch.float16: 2e-3}


@pytest.fixture(params=["reference", "torch", "cpp"])
def through(request):
    """Runs the test within one backend."""
    if request.param == "cpp":
        request.getfixturevalue("compiled")
    with backend(request.param):
        yield request.param


def ends(sizes) -> torch.Tensor:
    return torch.tensor(sizes).cumsum(0).to(torch.int32)


def loop(grad, x, sizes, grad_index=None, x_index=None):
    grad, x = (
        part.double() if index is None else part.double()[index] for part, index in ((grad, grad_index), (x, x_index))
    )
    found, start = [], 0
    for size in sizes:
        rows = range(start, start + size)
        found.append(sum((torch.outer(grad[row], x[row]) for row in rows), grad.new_zeros(grad.shape[1], x.shape[1])))
        start += size
    return torch.stack(found)


def check(sizes, columns, depth, dtype, *, beyond=0, indexed=False, seed=0):
    generator = torch.Generator().manual_seed(seed)
    rows = sum(sizes) + beyond
    tokens = 7 if indexed else rows
    grad, x = (torch.randn(tokens, width, generator=generator).to(dtype) for width in (columns, depth))
    index = [torch.randint(0, tokens, (rows,), generator=generator) if indexed else None for _ in range(2)]
    if beyond and not indexed:
        grad[-beyond:], x[-beyond:] = float("nan"), float("inf")
    found, wanted = grouped_wgrad(grad, x, ends(sizes), *index), loop(grad, x, sizes, *index)
    assert found.dtype == dtype
    assert (found.double() - wanted).norm() <= TOLERANCE[dtype] * wanted.norm()
    for group, size in enumerate(sizes):
        assert size or not found[group].any()


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("indexed", [False, True])
@pytest.mark.parametrize("sizes", [(5, 0, 7), (0, 0), (1,), (33, 2)], ids=str)
def test_values_are_those_of_a_loop_whatever_lies_past_the_end(through, sizes, indexed, dtype):
    check(sizes, 19, 21, dtype, beyond=3, indexed=indexed)
    check(sizes, 64, 8, dtype, indexed=indexed)


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_groups_too_long_to_be_packed_at_once(compiled, dtype):
    with backend("cpp"):
        check((513, 0, 2049, 1024), 50, 40, dtype, beyond=2)
        grad, x = torch.randn(2100, 50).to(dtype), torch.randn(2100, 40).to(dtype)
        threads = torch.get_num_threads()
        found = []
        for count in (1, 2):
            torch.set_num_threads(count)
            found.append(grouped_wgrad(grad, x, ends((2100,))))
        torch.set_num_threads(threads)
    assert torch.equal(*found)


@settings(max_examples=25)
@given(
    sizes=st.lists(st.integers(0, 30), min_size=1, max_size=9),
    columns=st.integers(1, 70),
    depth=st.integers(1, 70),
    beyond=st.integers(0, 3),
    indexed=st.booleans(),
    dtype=st.sampled_from([torch.float64, torch.float32]),
)
def test_compiled_kernels_at_drawn_shapes(compiled, sizes, columns, depth, dtype, **more):
    with backend("cpp"):
        check(sizes, columns, depth, dtype, **more)


@pytest.mark.parametrize("indexed", [False, True])
def test_gradcheck(through, indexed):
    grad, x = (torch.randn(6, width, dtype=torch.float64, requires_grad=True) for width in (2, 3))
    index = (torch.tensor([5, 0, 0, 2, 4]), torch.tensor([1, 1, 3, 2, 0])) if indexed else (None, None)
    assert torch.autograd.gradcheck(lambda *parts: grouped_wgrad(*parts, ends((2, 0, 3)), *index), (grad, x))


def test_under_autocast_it_computes_in_bfloat16(through):
    grad, x = torch.randn(5, 8), torch.randn(5, 4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert grouped_wgrad(grad, x, ends((2, 3))).dtype == torch.bfloat16


def test_bad_operands_are_refused(through):
    grad, x, offsets = torch.randn(5, 2), torch.randn(5, 3), ends((2, 3))
    with pytest.raises(ValueError, match="for \\[4, 5\\] rows"):
        grouped_wgrad(grad[:4], x, offsets)
    with pytest.raises(ValueError, match="int32"):
        grouped_wgrad(grad, x, offsets.long())
    with pytest.raises(ValueError, match="must share a dtype"):
        grouped_wgrad(grad.double(), x, offsets)
    if through != "reference":  # it never reads offsets on the host
        with pytest.raises(ValueError, match="offsets must not decrease nor pass the 5 rows"):
            grouped_wgrad(grad, x, ends((2, 4)))

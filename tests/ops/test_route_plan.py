"""The order of routed rows: every implementation against a plain loop; sentinels, and sizes that nobody routes to."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from omnimoe.ops import backend, route_plan

BACKENDS = ["reference", "torch", "cpp"]


@pytest.fixture(params=BACKENDS)
def through(request):
    """Runs the test within one backend."""
    if request.param == "cpp":
        request.getfixturevalue("compiled")
    with backend(request.param):
        yield request.param


def check(ids: torch.Tensor, num_groups: int) -> None:
    flat = ids.reshape(-1).tolist()
    order = [entry for group in range(num_groups) for entry, found in enumerate(flat) if found == group]
    counts = [flat.count(group) for group in range(num_groups)]
    order += [entry for entry, found in enumerate(flat) if not 0 <= found < num_groups]
    plan = route_plan(ids, num_groups)
    assert plan.offsets.tolist() == torch.tensor(counts).cumsum(0).tolist()
    assert plan.order.tolist() == order
    assert plan.token_index.tolist() == [entry // (ids.shape[1] if ids.ndim == 2 else 1) for entry in order]
    assert plan.inverse[plan.order].tolist() == list(range(len(flat)))
    assert (plan.offsets.dtype, plan.order.dtype, plan.token_index.dtype) == (torch.int32, torch.int64, torch.int64)


@pytest.mark.parametrize("ids", [[[2, 0], [1, 2], [0, 0]], [[1, 1], [1, 1]], [[-1, 9], [3, 1]]], ids=str)
def test_rows_come_in_group_order_and_equal_ids_keep_theirs(through, ids):
    check(torch.tensor(ids), 3)
    check(torch.tensor(ids).reshape(-1), 4)
    check(torch.tensor(ids, dtype=torch.int32), 3)
    check(torch.tensor(ids).t(), 3)


def test_nothing_to_route(through):
    check(torch.zeros(0, 2, dtype=torch.int64), 3)


@settings(max_examples=40)
@given(ids=st.lists(st.integers(-2, 12), max_size=40), num_groups=st.integers(1, 11))
def test_the_compiled_sort_at_drawn_sizes(compiled, ids, num_groups):
    with backend("cpp"):
        check(torch.tensor(ids, dtype=torch.int64), num_groups)


def test_bad_operands_are_refused():
    with pytest.raises(ValueError, match="\\(T, K\\) or \\(R,\\) integers, got \\(2,\\) torch.float32"):
        route_plan(torch.ones(2), 3)
    with pytest.raises(ValueError, match="integers, got \\(1, 1, 1\\)"):
        route_plan(torch.ones(1, 1, 1, dtype=torch.int64), 3)
    with pytest.raises(ValueError, match="num_groups must be at least 1, got 0"):
        route_plan(torch.ones(2, dtype=torch.int64), 0)

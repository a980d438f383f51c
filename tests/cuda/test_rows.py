"""Plan, gather and sums of csrc/cuda on the emulator, against PyTorch's own sort and sums."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.cuda import emulated

BOUND = {torch.float64: 1e-12, torch.float32: 1e-6, torch.bfloat16: 4e-3, torch.float16: 5e-4}


def check_plan(ops, ids: torch.Tensor, groups: int) -> None:
    offsets, order, inverse = ops.route_plan(ids, groups)
    keys = torch.where((ids < 0) | (ids >= groups), groups, ids)
    assert torch.equal(order, torch.argsort(keys, stable=True))
    assert torch.equal(inverse[order], torch.arange(len(ids)))
    ends = torch.searchsorted(keys[order], torch.arange(groups), right=True)
    assert offsets.dtype == torch.int32
    assert torch.equal(offsets.long(), ends)


@settings(max_examples=10)
@given(rows=st.integers(1, 300), groups=st.integers(1, 40), seed=st.integers(0, 99))
def test_the_plan_is_a_stable_sort_with_sentinels_last(ops, rows, groups, seed):
    ids = torch.randint(-2, groups + 2, (rows,), generator=torch.Generator().manual_seed(seed))
    check_plan(ops, ids, groups)


@pytest.mark.parametrize(("rows", "groups"), [(2049, 3), (2048, 255), (600, 256), (300, 70_000)])
def test_the_plan_of_several_blocks_and_of_groups_of_several_digits(ops, rows, groups):
    ids = torch.randint(-1, groups + 1, (rows,))
    ids[0] = groups - 1
    check_plan(ops, ids, groups)


def test_the_plan_of_one_group_of_nothing_and_of_sentinels_alone(ops):
    check_plan(ops, torch.zeros(40, dtype=torch.int64), 1)
    check_plan(ops, torch.full((40,), -1), 5)
    check_plan(ops, torch.tensor([torch.iinfo(torch.int64).min, torch.iinfo(torch.int64).max, 0]), 2)
    offsets, order, inverse = ops.route_plan(torch.zeros(0, dtype=torch.int64), 3)
    assert offsets.tolist() == [0, 0, 0]
    assert len(order) == len(inverse) == 0


@pytest.mark.parametrize("order", emulated.ORDERS)
def test_the_plan_does_not_depend_on_who_comes_first(ops, order):
    ids = torch.randint(-1, 9, (500,), generator=torch.Generator().manual_seed(1))
    with emulated.turns(order):
        check_plan(ops, ids, 8)


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [((8,), torch.bfloat16), ((3,), torch.bfloat16), ((5,), torch.float32), ((2, 3), torch.float64), ((), torch.int64),
     ((7,), torch.uint8)],
)  # fmt: skip
def test_rows_are_gathered_whatever_they_are_made_of(ops, shape, dtype):
    x = torch.randint(0, 100, (11, *shape)).to(dtype)
    index = torch.tensor([3, 10, 0, 3, 11, -1])
    filled = torch.tensor([True, True, False, True, True, True])
    found = ops.gather_rows(x, index, filled)
    wanted = x[index.clamp(0, 10)] * (filled & (index >= 0) & (index < 11)).view(-1, *[1] * len(shape)).to(dtype)
    assert torch.equal(found, wanted)
    assert torch.equal(ops.gather_rows(x, index[:4], None), x[index[:4]])
    assert ops.gather_rows(x, index[:0], None).shape == (0, *shape)


@pytest.mark.parametrize("dtype", BOUND)
@pytest.mark.parametrize("columns", [16, 7])
def test_rows_are_summed_by_token(ops, dtype, columns):
    tokens, rows = 9, 40
    y, token_index = torch.randn(rows, columns).to(dtype), torch.randint(0, tokens - 1, (rows,))
    weights = torch.rand(rows, dtype=torch.promote_types(dtype, torch.float32))
    offsets, order, _ = ops.route_plan(token_index, tokens)
    for given_ in (weights, None):
        found = ops.sum_rows(y, offsets, order, given_)
        weighted = y.double() * (1 if given_ is None else given_.double().unsqueeze(1))
        wanted = torch.zeros(tokens, columns, dtype=torch.float64).index_add(0, token_index, weighted)
        assert found.dtype == dtype
        assert torch.equal(found[-1], torch.zeros(columns, dtype=dtype))
        assert (found.double() - wanted).norm() <= BOUND[dtype] * wanted.norm()


def test_offsets_and_orders_that_lie_read_nothing_outside(ops):
    y = torch.randn(6, 4)
    offsets = torch.tensor([9, -3, 4], dtype=torch.int32)
    found = ops.sum_rows(y, offsets, torch.tensor([0, 1, 2, 3, 6, -1]), None)
    torch.testing.assert_close(found[0], y[:4].sum(0))
    assert found.isfinite().all()


def test_what_metadata_tells_is_refused(ops):
    x = torch.randn(4, 4)
    with pytest.raises(RuntimeError, match=r"expert_ids must be \(R,\) int64"):
        ops.route_plan(torch.zeros(2, 2, dtype=torch.int64), 2)
    with pytest.raises(RuntimeError, match="index must be"):
        ops.gather_rows(x, torch.zeros(2, dtype=torch.int32), None)
    with pytest.raises(RuntimeError, match=r"filled must be \(2,\) bool"):
        ops.gather_rows(x, torch.zeros(2, dtype=torch.int64), torch.ones(3, dtype=torch.bool))
    with pytest.raises(RuntimeError, match=r"weights must be \(4,\) float32"):
        ops.sum_rows(x, torch.tensor([4], dtype=torch.int32), torch.arange(4), torch.ones(4, dtype=torch.float64))

"""Rows: padding dropped, keys in order, time restored."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from omnimoe.layers import RowLayout

KEYS = torch.tensor([[2, 0, 1, 0], [1, 1, 0, 2]])
VALID = torch.tensor([[True, True, False, True], [False, True, True, True]])


def test_rows_are_in_key_order_and_equal_keys_in_order_of_time():
    rows = RowLayout.build(KEYS, num_keys=3, valid=VALID)
    assert rows.time_index.tolist() == [1, 3, 6, 5, 0, 7]
    assert rows.key_ids.tolist() == [0, 0, 0, 1, 2, 2]
    assert rows.offsets.tolist() == [3, 4, 6]
    assert rows.offsets.dtype == torch.int32
    assert len(rows) == 6
    assert rows.key_spans() == [(0, 3), (3, 4), (4, 6)]


def test_without_padding_and_with_one_key_the_layout_is_the_identity():
    rows = RowLayout.build(torch.zeros(2, 3, dtype=torch.int64), num_keys=1)
    assert rows.time_index is None
    assert rows.row_index is None
    x = torch.randn(2, 3, 5)
    assert rows.to_rows(x).data_ptr() == x.data_ptr()
    assert torch.equal(rows.to_time(rows.to_rows(x)), x)
    assert rows.offsets.tolist() == [6]


def test_time_order_is_kept_where_nothing_has_copies():
    rows = RowLayout.build(KEYS, num_keys=3, valid=VALID, sort=False)
    assert rows.time_index.tolist() == [0, 1, 3, 5, 6, 7]
    assert rows.key_ids.tolist() == [2, 0, 0, 1, 0, 2]
    with pytest.raises(ValueError, match="time order, but a bank with the tower map"):
        rows.segments((0, 1, 2))
    with pytest.raises(ValueError, match="needs_key_order True"):
        rows.key_spans()


@settings(max_examples=25)
@given(
    shape=st.tuples(st.integers(1, 3), st.integers(1, 7)),
    num_keys=st.integers(1, 4),
    padded=st.booleans(),
    sort=st.booleans(),
    seed=st.integers(0, 99),
)
def test_rows_and_back_for_any_batch(shape, num_keys, padded, sort, seed):
    generator = torch.Generator().manual_seed(seed)
    keys = torch.randint(0, num_keys, shape, generator=generator)
    valid = torch.rand(shape, generator=generator) < 0.7 if padded else None
    kept = torch.ones(shape, dtype=torch.bool) if valid is None else valid
    rows = RowLayout.build(keys, num_keys=num_keys, valid=valid, sort=sort)
    x = torch.randn(*shape, 2, generator=generator)
    packed = rows.to_rows(x)
    assert len(rows) == len(packed) == int(kept.sum())
    assert torch.equal(rows.to_time(packed), x * kept.unsqueeze(-1))
    assert torch.equal(rows.to_rows(keys), rows.key_ids)
    if sort:
        assert torch.equal(rows.key_ids, rows.key_ids.sort().values)
        assert rows.offsets.tolist() == [int((rows.key_ids <= key).sum()) for key in range(num_keys)]
    for key in range(num_keys):
        time = (keys.flatten() == key).logical_and(kept.flatten()).nonzero().squeeze(1)
        assert torch.equal(packed[rows.where(key)], x.view(-1, 2)[time])


def test_a_modality_with_several_keys_is_found_in_order_of_time():
    modalities = torch.tensor([[1, 0, 1, 1, 0, 1]])
    keys = torch.tensor([[1, 0, 0, 1, 1, 0]])
    for valid in (None, torch.tensor([[True, True, True, True, False, True]])):
        rows = RowLayout.build(keys, num_keys=2, modality_ids=modalities, valid=valid)
        x = torch.arange(6.0).view(1, 6, 1)
        assert rows.to_rows(x)[rows.where(1)].squeeze(1).tolist() == [0, 2, 3, 5]


@pytest.mark.parametrize(
    ("towers", "ends", "copies"),
    [
        ((0, 1, 2), [3, 4, 6], [0, 1, 2]),
        ((0, 1, 0), [3, 4, 6], [0, 1, 0]),
        ((0, 1, 1), [3, 6], [0, 1]),
        ((0, 0, 1), [4, 6], [0, 1]),
        ((1, 0, 0), [3, 6], [1, 0]),
        ((0, 0, 0), [6], [0]),
    ],
    ids=str,
)
def test_neighbouring_keys_of_one_copy_make_one_run(towers, ends, copies):
    rows = RowLayout.build(KEYS, num_keys=3, valid=VALID)
    found = rows.segments(towers)
    assert found[0].tolist() == ends
    assert found[0].dtype == torch.int32
    assert found[1] == copies


def test_an_absent_key_has_an_empty_span():
    rows = RowLayout.build(torch.tensor([[0, 2, 0]]), num_keys=3)
    assert rows.key_spans() == [(0, 2), (2, 2), (2, 3)]


def test_the_rows_of_one_key_are_a_layout_of_their_own():
    rows = RowLayout.build(KEYS, num_keys=3, valid=VALID, routes_causally=True).with_rotary(
        torch.randn(6, 2), torch.randn(6, 2)
    )
    span = rows.span(2)
    assert len(span) == 2
    assert span.key_ids.tolist() == [2, 2]
    assert span.time_index.tolist() == [0, 7]
    assert torch.equal(span.cos, rows.cos[4:])
    assert span.routes_causally


def test_rows_that_lie_in_key_order_already_keep_their_sequences():
    rows = RowLayout.build(torch.tensor([[0, 0, 1, 1], [1, 1, 1, 2]]), num_keys=3)
    assert rows.time_index is None
    assert [rows.span(key).sequence_ids().tolist() for key in range(3)] == [[0, 0], [0, 0, 1, 1, 1], [1]]


def test_a_batch_of_padding_alone_has_no_rows_and_comes_back_as_zeros():
    rows = RowLayout.build(KEYS, num_keys=3, valid=torch.zeros_like(VALID))
    x = torch.randn(2, 4, 3, requires_grad=True)
    packed = rows.to_rows(x)
    assert packed.shape == (0, 3)
    back = rows.to_time(packed)
    assert torch.equal(back, torch.zeros(2, 4, 3))
    back.sum().backward()
    assert torch.equal(x.grad, torch.zeros(2, 4, 3))


def test_gradients_flow_through_both_ways():
    rows = RowLayout.build(KEYS, num_keys=3, valid=VALID)
    x = torch.randn(2, 4, 3, dtype=torch.float64, requires_grad=True)
    scale = torch.arange(1.0, 7.0, dtype=torch.float64).unsqueeze(1)
    assert torch.autograd.gradcheck(lambda given_: rows.to_time(rows.to_rows(given_) * scale), (x,))


def test_runs_are_the_segments_on_the_host():
    rows = RowLayout.build(torch.tensor([[2, 0, 1, 0, 2]]), num_keys=3)
    for towers in ((0, 1, 2), (0, 0, 1), (0, 1, 0), (0, 0, 0)):
        ends, copies = rows.segments(towers)
        assert [(stop, copy) for _, stop, copy in rows.runs(towers)] == list(zip(ends.tolist(), copies, strict=True))
        assert [start for start, _, _ in rows.runs(towers)] == [0, *ends.tolist()[:-1]]


def test_keys_in_order_are_left_where_they_are():
    keys = torch.tensor([[0, 0, 1], [1, 1, 2]])
    rows = RowLayout.build(keys, num_keys=4)
    assert rows.is_sorted
    assert rows.time_index is None
    assert rows.offsets.tolist() == [2, 5, 6, 6]
    assert RowLayout.build(keys.flip(1), num_keys=4).time_index is not None
    padded = RowLayout.build(keys, num_keys=4, valid=keys < 2)
    assert padded.time_index.tolist() == [0, 1, 2, 3, 4]
    assert padded.offsets.tolist() == [2, 5, 5, 5]

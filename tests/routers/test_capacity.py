"""Capacity: against a loop that seats rows one by one, and against st-moe-pytorch where it is installed."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from omnimoe.layers import RowLayout
from omnimoe.routers import TopKRouter
from omnimoe.routers.capacity import capacity_of, with_room


def seated(ids, num_experts, capacity, pools, order):
    """Who gets a seat: first choices of all rows in turn, then second choices."""
    taken, found = {}, torch.zeros_like(ids, dtype=torch.bool)
    for choice in range(ids.shape[1]):
        for row in order:
            expert = int(ids[row, choice])
            if not 0 <= expert < num_experts:
                found[row, choice] = True
                continue
            seat = (int(pools[row]), expert)
            found[row, choice] = taken.get(seat, 0) < capacity
            taken[seat] = taken.get(seat, 0) + 1
    return found


@settings(max_examples=40)
@given(
    seed=st.integers(0, 10**6),
    top_k=st.integers(1, 3),
    capacity=st.integers(1, 6),
    pool=st.sampled_from(["batch", "sequence"]),
    by_score=st.booleans(),
    sort=st.booleans(),
)
def test_it_seats_as_a_loop_does(seed, top_k, capacity, pool, by_score, sort):
    generator = torch.Generator().manual_seed(seed)
    keys = torch.randint(0, 2, (2, 7), generator=generator)
    valid = torch.rand(2, 7, generator=generator) < 0.8
    rows = RowLayout.build(keys, num_keys=2, valid=valid, sort=sort)
    # ids of five experts, of a free one and of none
    ids = torch.randint(-1, 6, (len(rows), top_k), generator=generator)
    priority = torch.randint(0, 5, (len(rows),), generator=generator).float() if by_score else None
    found = with_room(ids, 5, capacity, rows, pool=pool, priority=priority)
    order = priority.argsort(descending=True, stable=True) if by_score else rows.time_index.argsort()
    pools = rows.time_index // 7 if pool == "sequence" else torch.zeros(len(rows))
    assert torch.equal(found, seated(ids, 5, capacity, pools, order.tolist()))


@pytest.mark.parametrize(
    ("factor", "top_k", "rows", "experts", "wanted"), [(1.0, 2, 10, 4, 5), (1.25, 1, 7, 4, 3), (1.1, 1, 100, 10, 11)]
)
def test_room_is_the_factor_times_an_even_share_rounded_up(factor, top_k, rows, experts, wanted):
    assert capacity_of(factor, top_k, rows, experts) == wanted


def route(x, batch=1, causal=False, **fields):
    router = TopKRouter.Config(**fields).build(hidden_size=x.shape[-1], num_experts=4, num_modalities=1)
    router.scorer.weight.data.normal_(generator=torch.Generator().manual_seed(0))
    keys = torch.zeros(batch, len(x) // batch, dtype=torch.int64)
    return router, router(x, RowLayout.build(keys, num_keys=1, routes_causally=causal))


@pytest.mark.parametrize("priority", ["position", "score"])
def test_dropped_choices_have_no_expert_no_weight_and_are_counted(priority):
    x = torch.randn(20, 6)
    _, routing = route(x, capacity_factor=0.5, capacity_priority=priority)
    dropped = routing.expert_ids < 0
    assert int(routing.dropped) == int(dropped.sum()) > 0
    assert not routing.expert_weights[dropped].any()
    assert torch.bincount(routing.expert_ids[~dropped], minlength=4).max() <= 5


def test_later_rows_lose_their_place_and_surer_rows_keep_it():
    x = torch.randn(1, 6).repeat(8, 1)
    _, first = route(x, top_k=1, capacity=3)
    assert first.expert_ids.ge(0).tolist() == [True] * 3 + [False] * 5
    x = x * torch.linspace(0.2, 1, 8).unsqueeze(1)
    _, surest = route(x, top_k=1, capacity=3, capacity_priority="score")
    assert surest.expert_ids.ge(0).tolist() == [False] * 5 + [True] * 3


@pytest.mark.parametrize("kept", [True, False])
def test_weights_sum_to_one_over_what_was_kept_or_over_what_was_chosen(kept):
    x = torch.randn(20, 6)
    _, routing = route(x, capacity_factor=0.5, normalize_kept=kept)
    total = routing.expert_weights.view(20, 2).sum(-1)
    partly = (routing.expert_ids.view(20, 2) >= 0).sum(-1) == 1
    assert partly.any()
    assert ((total[partly] - 1).abs() < 1e-6).all() if kept else (total[partly] < 1).all()


def test_nothing_is_dropped_where_a_row_may_not_look_at_others():
    x = torch.randn(20, 6)
    router, routing = route(x, capacity=1, causal=True)
    assert (routing.expert_ids >= 0).all()
    assert routing.dropped is None
    assert not router.config.is_causal
    assert router.config.has_causal_form


@pytest.mark.parametrize("top_k", [2, 3])
def test_the_peer_seats_the_same(top_k):
    peer = pytest.importorskip("st_moe_pytorch", reason="pip install st-moe-pytorch").st_moe_pytorch
    gate = peer.TopNGating(
        6, 4, top_n=top_k, threshold_train=1e-6, threshold_eval=1e-6, capacity_factor_eval=1.25
    ).eval()
    x = torch.randn(2, 20, 6)
    combine = gate(x)[1]
    router = TopKRouter.Config(top_k=top_k, capacity=6, capacity_pool="sequence").build(
        hidden_size=6, num_experts=4, num_modalities=1
    )
    router.scorer.weight.data.copy_(gate.to_gates.weight)
    routing = router(x.view(40, 6), RowLayout.build(torch.zeros(2, 20, dtype=torch.int64), num_keys=1))
    table = torch.zeros(40, 4)
    taken = routing.expert_ids >= 0
    table[routing.token_index[taken], routing.expert_ids[taken]] = routing.expert_weights[taken]
    assert int(routing.dropped) > 0
    torch.testing.assert_close(table, combine.sum(-1).view(40, 4))


@pytest.mark.parametrize("pool", ["batch", "sequence"])
def test_rows_that_do_not_count_take_no_room(pool):
    x, counted = torch.randn(20, 6), torch.arange(20) % 3 > 0
    config = TopKRouter.Config(capacity_factor=0.6, capacity_pool=pool, capacity_priority="score", expert_bias="shared")
    router = config.build(hidden_size=6, num_experts=4, num_modalities=1)
    router.scorer.weight.data.normal_()
    rows = RowLayout.build(torch.zeros(1, 20, dtype=torch.int64), num_keys=1)
    found = router(x, RowLayout(**{**vars(rows), "counted": counted}))
    valid = RowLayout.build(torch.zeros(1, 20, dtype=torch.int64), num_keys=1, valid=counted.view(1, 20))
    wanted = router(x[counted], valid)
    assert torch.equal(found.expert_ids.view(20, 2)[counted], wanted.expert_ids.view(-1, 2))
    assert (found.expert_ids.view(20, 2)[~counted] == -1).all()
    assert int(found.dropped) == int(wanted.dropped) > 0
    torch.testing.assert_close(found.expert_weights.view(20, 2)[counted], wanted.expert_weights.view(-1, 2))
    for name, loss in wanted.losses.items():
        torch.testing.assert_close(found.losses[name], loss)
    router.update(found)
    moved = router.expert_bias.clone()
    router.expert_bias.zero_()
    router.update(wanted)
    assert torch.equal(moved, router.expert_bias)

"""Shares of tokens that meet each copy: whole numbers for towers, choices for routers, sums that fit."""

from __future__ import annotations

import pytest
import torch

from omnimoe.experts import FeedForward
from omnimoe.routing_load import routing_load
from tests.declarations import DECLARATIONS, DENSE, build, ids_like


def batches(config, count: int = 2) -> list[dict[str, torch.Tensor]]:
    return [{"input_ids": ids_like(config, seed=seed), "labels": ids_like(config, seed=seed)} for seed in range(count)]


def test_one_copy_meets_every_token():
    assert routing_load(build(DENSE), batches(DENSE)).tolist() == [[[1.0]] * 3] * 2


def test_towers_meet_their_own_modality():
    load = routing_load(build(DECLARATIONS["mot"]), batches(DECLARATIONS["mot"]))
    assert torch.equal(load, torch.eye(3, dtype=torch.float64).expand(2, 3, 3))
    merged = DENSE.replace(experts=FeedForward.Config(intermediate_size=24, towers=(1, 0, 1)))
    assert routing_load(build(merged), batches(merged))[0].tolist() == [[0, 1], [1, 0], [0, 1]]


@pytest.mark.parametrize(("name", "experts"), [("moe", 2.0), ("static", 1.0), ("moma_top_k", 1.0)])
def test_choices_sum_to_the_experts_of_a_token(name, experts):
    config = DECLARATIONS[name]
    load = routing_load(build(config), batches(config))
    assert load.dtype == torch.float64
    assert load.shape[:2] == (2, 3)
    assert load.sum(-1) == pytest.approx(torch.full((2, 3), experts, dtype=torch.float64))
    assert float(load.min()) >= 0


def test_experts_of_a_modality_meet_no_other():
    load = routing_load(build(DECLARATIONS["moma"]), batches(DECLARATIONS["moma"]))
    assert not load[:, 0, 2:].any()
    assert not load[:, 1, :2].any()
    assert not load[:, 1, 5:].any()
    assert not load[:, 2, :5].any()


def test_it_counts_what_the_router_chose():
    config = DECLARATIONS["moe"]
    model, given = build(config), batches(config, count=1)
    load = routing_load(model, given)
    out = model(given[0]["input_ids"])
    chosen, ids = out.routings[1], out.rows.modality_ids
    for modality in range(3):
        taken = chosen.expert_ids[ids[chosen.token_index] == modality]
        expected = torch.bincount(taken, minlength=4).double() / int((ids == modality).sum())
        assert torch.allclose(load[1, modality], expected)


def test_layers_of_several_kinds_share_one_table():
    config = DECLARATIONS["mot_hybrid"]
    load = routing_load(build(config), batches(config))
    assert load.shape == (3, 3, 4)
    assert load[0].sum(-1).tolist() == [1.0] * 3
    assert load[1].sum(-1) == pytest.approx(torch.full((3,), 2.0, dtype=torch.float64))


def test_an_absent_modality_has_zeros_and_the_mode_is_put_back():
    model = build(DENSE).train()
    load = routing_load(model, [{"input_ids": torch.full((1, 6), 9)}])
    assert load[0].tolist() == [[1.0], [0.0], [0.0]]
    assert model.training

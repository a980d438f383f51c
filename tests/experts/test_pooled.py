"""Experts in pools of unequal width, under every router and every way of computing them."""

from __future__ import annotations

import dataclasses

import pytest
import torch
import torch.nn.functional as F

from omnimoe.config import ConfigError
from omnimoe.experts import RoutedExperts
from omnimoe.experts.pooled import PooledMLP
from omnimoe.experts_interface import experts_function
from omnimoe.layers import RowLayout
from omnimoe.routers import ByModalityRouter, ExpertChoiceRouter, Router, StaticRouter, TopKRouter
from tests.refusals import unchanged

KEYS = torch.tensor([[0, 1, 2, 1, 0, 0, 1, 2, 1, 1]])
POOLS = ((2, 12), (1, 4), (3, 8))
ROUTERS = {
    "top_k": TopKRouter.Config(top_k=2),
    "expert_choice": ExpertChoiceRouter.Config(capacity_factor=0.6),
    "by_modality": ByModalityRouter.Config(experts=(2, 1, 3), router=TopKRouter.Config(top_k=1)),
    "static": StaticRouter.Config(experts_of_keys=(0, 2, (3, 5))),
}


def config(router: Router.Config, **fields) -> RoutedExperts.Config:
    return RoutedExperts.Config(num_experts=6, intermediate_size=7, pools=POOLS, router=router, **fields)


def make(router: Router.Config, **fields) -> RoutedExperts:
    layer = config(router, **fields).build(hidden_size=8, num_modalities=3, layer_idx=0)
    for parameter in layer.parameters():
        parameter.data.normal_(std=0.4)
    return layer


def expert(layer: RoutedExperts, number: int, x: torch.Tensor) -> torch.Tensor:
    places = [(pool, place) for pool, count in enumerate(layer.experts.counts) for place in range(count)]
    pool, place = places[int(number)]
    gate, up = F.linear(x, layer.experts.pools[pool].gate_up_proj[place]).chunk(2, -1)
    return F.linear(F.silu(gate) * up, layer.experts.pools[pool].down_proj[place])


@pytest.mark.parametrize("reads", [True, False], ids=["offsets read", "offsets on a device"])
@pytest.mark.parametrize("weights_on", ["output", "input"])
@pytest.mark.parametrize("name", ROUTERS)
def test_a_row_is_the_weighted_sum_of_its_experts(name, weights_on, reads, monkeypatch):
    monkeypatch.setattr("omnimoe.ops._pools.reads_offsets", lambda x: reads)
    layer, rows, x = make(ROUTERS[name], weights_on=weights_on), RowLayout.build(KEYS, num_keys=3), torch.randn(10, 8)
    y, routing = layer(x, rows)
    wanted = torch.zeros(10, 8)
    for row, number, weight in zip(routing.token_index, routing.expert_ids, routing.expert_weights, strict=True):
        if number >= 0:
            given = (weight, 1.0) if weights_on == "output" else (1.0, weight)
            wanted[row] += given[0] * expert(layer, number, x[row] * given[1])
    torch.testing.assert_close(y, wanted, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", ["eager", "grouped_mm"])
def test_every_implementation_gives_the_same(name):
    layer, rows, x = make(ROUTERS["top_k"]), RowLayout.build(KEYS, num_keys=3), torch.randn(10, 8)
    theirs = dataclasses.replace(rows, compute=experts_function(name))
    torch.testing.assert_close(layer(x, theirs)[0], layer(x, rows)[0], atol=1e-5, rtol=1e-4)


def test_pools_of_one_width_are_a_bank():
    pools = PooledMLP(((2, 6), (3, 6)), 8)
    whole = PooledMLP(((5, 6),), 8)
    with torch.no_grad():
        for name in ("gate_up_proj", "down_proj"):
            parts = [getattr(pool, name) for pool in pools.pools]
            getattr(whole.pools[0], name).copy_(torch.cat(parts))
    offsets = torch.tensor([2, 2, 5, 6, 7], dtype=torch.int32)
    x = torch.randn(9, 8)  # the last two are nobody's
    assert torch.equal(pools(x, offsets), whole(x, offsets))
    assert not pools(x, offsets)[7:].any()


@pytest.mark.hazard(19)
@pytest.mark.parametrize("name", ROUTERS)
def test_every_parameter_gets_a_gradient_and_no_rows_are_no_error(name):
    layer = make(ROUTERS[name], num_shared_experts=1)
    for count in (10, 0):
        layer.zero_grad()
        rows = RowLayout.build(KEYS[:, :count], num_keys=3)
        x = torch.randn(count, 8)
        with unchanged(layer.state_dict(), x):
            y, _ = layer(x, rows)
            y.square().sum().backward()
        for key, parameter in layer.named_parameters():
            assert parameter.grad is not None, key
            assert parameter.grad.isfinite().all(), key


def test_active_parameters_are_of_the_pool_that_a_modality_reaches():
    by_modality = config(ROUTERS["by_modality"], num_shared_experts=2)
    matrices, shared, router = 3 * 8, 2 * 7, 8
    assert [by_modality.active_params(8, modality) for modality in range(3)] == [
        matrices * (12 + shared) + 2 * router,
        matrices * (4 + shared),  # one expert is no choice
        matrices * (8 + shared) + 3 * router,
    ]
    mean = (2 * 12 + 4 + 3 * 8) / 6
    assert config(ROUTERS["top_k"]).active_params(8, 0) == pytest.approx(matrices * 2 * mean + 6 * router)
    assert config(ROUTERS["static"]).active_params(8, 2) == matrices * 2 * 8


def test_plans_name_the_pools():
    held = config(ROUTERS["top_k"], num_shared_experts=1)
    assert held.tp_plan == {"experts.pools.*": "bank_mlp", "shared_experts": "bank_mlp"}
    assert held.ep_plan == {
        "experts.pools.*": "ep_dispatch_experts",
        "experts.pools.*.gate_up_proj": "grouped_gemm",
        "experts.pools.*.down_proj": "grouped_gemm",
    }


def test_the_config_is_read_back():
    held = config(ROUTERS["top_k"])
    assert RoutedExperts.Config.from_dict(held.to_dict()) == held


@pytest.mark.parametrize(
    ("pools", "message"),
    [
        (((2, 12), (1, 5)), r"must sum to num_experts 6"),
        (((6, 0),), "both at least 1"),
        (((6,),), "both at least 1"),
        ((("6", 12),), "both at least 1"),
        ((6, 12), "must be tuple"),
    ],
)
def test_pools_that_make_no_bank_are_refused(pools, message):
    with pytest.raises(ConfigError, match=message):
        RoutedExperts.Config(num_experts=6, pools=pools)

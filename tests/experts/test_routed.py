"""Routed experts: a weighted sum over what the router chose."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from omnimoe.layers import RowLayout
from omnimoe.routers import ByModalityRouter, ExpertChoiceRouter, TopKRouter
from tests.declarations import routed
from tests.refusals import unchanged

KEYS = torch.tensor([[0, 1, 2, 1, 0, 0, 1, 2, 1, 1]])
ROUTERS = {
    "top_k": TopKRouter.Config(top_k=2),
    "expert_choice": ExpertChoiceRouter.Config(capacity_factor=1.5),
    "sparse": ExpertChoiceRouter.Config(capacity_factor=0.2),
    "by_modality": ByModalityRouter.Config(experts=(2, 1, 3)),
}


def make(router, **fields):
    layer = routed(6, router, **fields).build(hidden_size=8, num_modalities=3, layer_idx=0)
    for parameter in layer.parameters():
        parameter.data.normal_(std=0.4)
    return layer


def expert(layer, number: int, x: torch.Tensor) -> torch.Tensor:
    gate, up = F.linear(x, layer.experts.gate_up_proj[number]).chunk(2, -1)
    return F.linear(F.silu(gate) * up, layer.experts.down_proj[number])


@pytest.mark.parametrize("name", ROUTERS)
@pytest.mark.parametrize("shared", [0, 2])
def test_a_row_is_the_weighted_sum_of_its_experts_and_the_shared_ones(name, shared):
    layer, rows, x = (
        make(ROUTERS[name], num_shared_experts=shared),
        RowLayout.build(KEYS, num_keys=3),
        torch.randn(10, 8),
    )
    y, routing = layer(x, rows)
    wanted = torch.zeros(10, 8)
    for row, number, weight in zip(routing.token_index, routing.expert_ids, routing.expert_weights, strict=True):
        wanted[row] += weight * expert(layer, number, x[row])
    if shared:
        gate, up = F.linear(x, layer.shared_experts.gate_up_proj[0]).chunk(2, -1)
        assert gate.shape[1] == 2 * 24
        wanted += F.linear(F.silu(gate) * up, layer.shared_experts.down_proj[0])
    torch.testing.assert_close(y, wanted, atol=1e-5, rtol=1e-4)


def test_a_row_that_no_expert_takes_comes_out_as_zero():
    layer, rows, x = make(ROUTERS["sparse"]), RowLayout.build(KEYS, num_keys=3), torch.randn(10, 8)
    y, routing = layer(x, rows)
    untaken = sorted(set(range(10)) - set(routing.token_index.tolist()))
    assert untaken
    assert torch.equal(y[untaken], torch.zeros(len(untaken), 8))
    assert y[routing.token_index].any(-1).all()


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
            assert parameter.grad.any() == bool(count), key


def test_active_parameters_count_chosen_shared_and_router():
    expert_size = 3 * 8 * 24
    config = routed(6, TopKRouter.Config(top_k=2), num_shared_experts=1)
    assert config.active_params(8, 0) == 3 * expert_size + 6 * 8
    config = routed(6, ByModalityRouter.Config(experts=(2, 3, 1)))
    assert [config.active_params(8, modality) for modality in range(3)] == [
        expert_size + 2 * 8,
        expert_size + 3 * 8,
        expert_size,
    ]


def test_causality_and_key_order_are_the_routers():
    assert routed(6, TopKRouter.Config()).is_causal
    assert not routed(6, ExpertChoiceRouter.Config()).is_causal
    assert not routed(6, TopKRouter.Config()).needs_key_order
    assert routed(6, ByModalityRouter.Config(experts=(2, 3, 1))).needs_key_order

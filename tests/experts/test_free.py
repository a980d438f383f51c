"""Experts that compute next to nothing, and shared experts under their gates: against sums written out."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from omnimoe.config import ConfigError
from omnimoe.experts import RoutedExperts
from omnimoe.layers import RowLayout
from omnimoe.routers import ByModalityRouter, ExpertChoiceRouter, TopKRouter

KEYS = torch.tensor([[0, 1, 2, 1, 0, 0, 1, 2, 1, 1]])
ROUTERS = {
    "top_k": TopKRouter.Config(top_k=3),
    "top_p": TopKRouter.Config(top_k=8, top_p=0.6),
    "by_modality": ByModalityRouter.Config(experts=(2, 1, 3), gate_lone_expert=True, router=TopKRouter.Config(top_k=3)),
    "capacity": TopKRouter.Config(top_k=3, capacity=3),
}
FREE = {"num_zero_experts": 1, "num_identity_experts": 2, "num_constant_experts": 2}


def make(router, **fields):
    config = RoutedExperts.Config(num_experts=6, intermediate_size=12, router=router, **fields)
    layer = config.build(hidden_size=8, num_modalities=3, layer_idx=0)
    for parameter in layer.parameters():
        parameter.data.normal_(std=0.4)
    return layer


def network(bank, number: int, x: torch.Tensor) -> torch.Tensor:
    gate, up = F.linear(x, bank.gate_up_proj[number]).chunk(2, -1)
    return F.linear(F.silu(gate) * up, bank.down_proj[number])


def by_hand(layer, x: torch.Tensor, routing) -> torch.Tensor:
    """Entry by entry."""
    y = torch.zeros_like(x)
    for row, number, weight in zip(routing.token_index, routing.expert_ids, routing.expert_weights, strict=True):
        kind = layer.config.free_experts[number - 6] if number >= 6 else "none" if number < 0 else "bank"
        if kind == "bank":
            y[row] += weight * network(layer.experts, number, x[row])
        elif kind == "identity":
            y[row] += weight * x[row]
        elif kind == "constant":
            constant = number - 6 - layer.config.num_zero_experts - layer.config.num_identity_experts
            a, b = (layer.free_experts.mix[constant] @ x[row]).softmax(0)
            y[row] += weight * (a * x[row] + b * layer.free_experts.vectors[constant])
    return y


@pytest.mark.parametrize("name", ROUTERS)
def test_each_kind_gives_what_it_says(name):
    layer, rows, x = make(ROUTERS[name], **FREE), RowLayout.build(KEYS, num_keys=3), torch.randn(10, 8)
    y, routing = layer(x, rows)
    assert routing.router_logits.shape == (10, 11)
    assert (routing.expert_ids >= 6).any()
    torch.testing.assert_close(y, by_hand(layer, x, routing), atol=1e-5, rtol=1e-4)
    y.square().sum().backward()
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in layer.parameters())


def test_groups_share_free_experts_and_keep_their_own():
    layer, rows = make(ROUTERS["by_modality"], **FREE), RowLayout.build(KEYS, num_keys=3)
    _, routing = layer(torch.randn(10, 8), rows)
    group = torch.tensor([0, 0, 1, 2, 2, 2])
    own = routing.expert_ids < 6
    assert torch.equal(group[routing.expert_ids[own]], rows.key_ids[routing.token_index[own]])
    finite = routing.router_logits.isfinite()
    assert finite[:, 6:].all()
    assert finite[rows.where(1)].tolist() == [[False, False, True, False, False, False] + [True] * 5] * 5


def test_a_row_sent_to_zero_experts_alone_comes_out_as_zero():
    layer = make(TopKRouter.Config(top_k=2), num_zero_experts=2)
    layer.router.scorer.weight.data[6:] = 1.0
    layer.router.scorer.weight.data[:6] = -1.0
    x = torch.rand(10, 8)
    y, routing = layer(x, RowLayout.build(KEYS, num_keys=3))
    assert set(routing.expert_ids.tolist()) == {6, 7}
    assert torch.equal(y, torch.zeros_like(y))


@pytest.mark.parametrize("keeps", [True, False])
def test_a_zero_expert_keeps_its_share_or_gives_it_up(keeps):
    layer = make(TopKRouter.Config(top_k=3, zero_keeps_share=keeps), num_zero_experts=3)
    _, routing = layer(torch.randn(10, 8), RowLayout.build(KEYS, num_keys=3))
    ids, weights = routing.expert_ids.view(10, 3), routing.expert_weights.view(10, 3)
    met = (weights * (ids < 6)).sum(-1)
    some = ((ids >= 6).any(-1)) & (ids < 6).any(-1)
    assert some.any()
    if keeps:
        torch.testing.assert_close(weights.sum(-1), torch.ones(10))
        assert (met[some] < 1).all()
    else:
        torch.testing.assert_close(met[some], torch.ones(int(some.sum())))


def test_shared_experts_take_part_in_the_softmax():
    """Uni-MoE-2.0: one softmax over what was chosen and the shared experts, each with a weight of its own."""
    router = TopKRouter.Config(top_k=7, top_p=0.7)
    layer = make(router, num_shared_experts=2, shared_gate="softmax", num_zero_experts=1, shared_intermediate_size=4)
    rows, x = RowLayout.build(KEYS, num_keys=3), torch.randn(10, 8)
    y, routing = layer(x, rows)
    logits = x @ layer.router.scorer.weight.T
    wanted = torch.zeros(10, 8)
    for row in range(10):
        order = logits[row, :7].argsort(descending=True).tolist()
        probs = logits[row, :7].softmax(0)
        chosen, held = [], 0.0
        for number in order:
            if held < 0.7:
                chosen.append(number)
                held += probs[number].item()
        weights = logits[row, [*chosen, 7, 8]].softmax(0)
        for number, weight in zip(chosen, weights, strict=False):
            if number < 6:
                wanted[row] += weight * network(layer.experts, number, x[row])
        for number in range(2):
            wanted[row] += weights[len(chosen) + number] * network(layer.shared_experts, number, x[row])
    torch.testing.assert_close(y, wanted, atol=1e-5, rtol=1e-4)
    assert routing.shared_weights.shape == (10, 2)
    y.sum().backward()
    assert layer.router.scorer.weight.grad[7:].any()


def test_shared_experts_take_part_inside_each_group():
    router = ByModalityRouter.Config(experts=(2, 2, 2), router=TopKRouter.Config(top_k=2))
    layer = make(router, num_shared_experts=1, shared_gate="softmax")
    rows, x = RowLayout.build(KEYS, num_keys=3), torch.randn(10, 8)
    y, routing = layer(x, rows)
    rest = by_hand(layer, x, routing) + routing.shared_weights * network(layer.shared_experts, 0, x)
    torch.testing.assert_close(y, rest, atol=1e-5, rtol=1e-4)
    total = torch.zeros(10).index_add(0, routing.token_index, routing.expert_weights) + routing.shared_weights[:, 0]
    torch.testing.assert_close(total, torch.ones(10))


def test_counts_of_weights_follow():
    bank, x = 3 * 8 * 12, 8
    config = RoutedExperts.Config(num_experts=6, intermediate_size=12, router=TopKRouter.Config(top_k=2))
    assert config.active_params(x, 0) == 2 * bank + 6 * 8
    free = config.replace(num_zero_experts=2)
    assert free.active_params(x, 0) == 1.5 * bank + 8 * 8
    shared = config.replace(num_shared_experts=2, shared_intermediate_size=5, shared_gate="sigmoid")
    assert shared.active_params(x, 0) == 2 * bank + 6 * 8 + 2 * 3 * 8 * 5 + 8


@pytest.mark.parametrize(
    ("router", "fields", "told"),
    [
        (ExpertChoiceRouter.Config(), {"num_zero_experts": 1}, "bank alone"),
        (ByModalityRouter.Config(experts=(4, 1, 1), router=TopKRouter.Config()), {"num_zero_experts": 1}, "bank alone"),
        (TopKRouter.Config(), {"shared_gate": "sigmoid"}, "gates nothing"),
        (TopKRouter.Config(), {"shared_gate": "tanh", "num_shared_experts": 1}, "known: none, sigmoid, softmax"),
        (TopKRouter.Config(), {"num_identity_experts": -1}, "at least 0, got -1"),
        (TopKRouter.Config(), {"weights_on": "both"}, "known: output, input"),
        (TopKRouter.Config(score="sigmoid"), {"shared_gate": "softmax", "num_shared_experts": 1}, "score='softmax'"),
    ],
)
def test_what_does_not_fit_is_refused(router, fields, told):
    with pytest.raises(ConfigError, match=told):
        make(router, **fields)

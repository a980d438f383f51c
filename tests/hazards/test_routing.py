"""Routing at its edges: one expert for all, no rows at all, ties, and rows in another order."""

from __future__ import annotations

import copy

import pytest
import torch

from omnimoe.layers import RowLayout
from omnimoe.routers import ByModalityRouter, ExpertChoiceRouter, Router, StaticRouter, TopKRouter
from tests.declarations import DECLARATIONS, build, ids_like, routed
from tests.refusals import unchanged

ROWS, WIDTH = 257, 16


def make(num_experts: int, router: Router.Config, *, keys: int = 1):
    torch.manual_seed(0)
    layer = routed(num_experts, router).build(hidden_size=WIDTH, num_modalities=keys, layer_idx=0)
    for parameter in layer.parameters():
        parameter.data.normal_(std=0.3)
    return layer


def dense(layer, *numbers: int):
    """The mean of some experts' networks, each applied to every row."""

    def apply(x: torch.Tensor) -> torch.Tensor:
        total = 0.0
        for number in numbers:
            gate, up = (x @ layer.experts.gate_up_proj[number].T).chunk(2, -1)
            total = total + (torch.nn.functional.silu(gate) * up) @ layer.experts.down_proj[number].T
        return total / len(numbers)

    return apply


def layout(rows: int = ROWS, key: int = 0, keys: int = 1) -> RowLayout:
    return RowLayout.build(torch.full((1, rows), key), num_keys=keys)


def send_all(layer, *numbers: int) -> None:
    """Makes the router choose these experts for rows whose first entry is 1."""
    with torch.no_grad():
        layer.router.scorer.weight.zero_()
        layer.router.scorer.weight[:, 0] = -60.0
        layer.router.scorer.weight[list(numbers), 0] = 60.0


IN_ATTENTION = ["attention_experts", "attention_heads"]
TO_ONE = {
    "token choice, the only expert": (1, 1, (0,)),
    "token choice, the first of 4": (4, 1, (0,)),
    "token choice, the last of 4": (4, 1, (3,)),
    "token choice, one of 64": (64, 1, (17,)),
    "token choice, two of 4": (4, 2, (1, 3)),
    "token choice, two of 64": (64, 2, (63, 0)),
}


@pytest.mark.hazard(18)
@pytest.mark.parametrize("case", TO_ONE)
def test_when_all_rows_choose_one_expert_it_is_a_dense_network(case):
    num_experts, top_k, chosen = TO_ONE[case]
    layer = make(num_experts, TopKRouter.Config(top_k=top_k))
    send_all(layer, *chosen)
    x = torch.randn(ROWS, WIDTH)
    x[:, 0] = 1.0
    same_as_dense(layer, x, layout(), chosen)


@pytest.mark.hazard(18)
@pytest.mark.parametrize("router", ["static", "by_modality", "expert_choice"])
def test_when_a_router_of_another_kind_sends_all_rows_to_one_expert_it_is_dense_too(router):
    x = torch.randn(ROWS, WIDTH)
    if router == "expert_choice":
        layer = make(1, ExpertChoiceRouter.Config(score="softmax"))
        same_as_dense(layer, x, layout(), (0,))
    else:
        kinds = {"static": StaticRouter.Config(), "by_modality": ByModalityRouter.Config(experts=(1, 1, 1))}
        layer = make(3, kinds[router], keys=3)
        same_as_dense(layer, x, layout(key=2, keys=3), (2,))


def same_as_dense(layer, x: torch.Tensor, rows: RowLayout, chosen: tuple[int, ...]) -> None:
    x = x.requires_grad_()
    with unchanged(layer, x):
        y, routing = layer(x, rows)
    # no row is dropped, however many there are
    assert sorted(routing.token_index.tolist()) == sorted(list(range(len(x))) * len(chosen))
    assert set(routing.expert_ids.tolist()) == set(chosen)
    wanted = dense(layer, *chosen)(x)
    torch.testing.assert_close(y, wanted, atol=1e-5, rtol=1e-4)
    own, reference = (torch.autograd.grad(out.square().sum(), x, retain_graph=True)[0] for out in (y, wanted))
    torch.testing.assert_close(own, reference, atol=1e-4, rtol=1e-3)
    y.sum().backward()
    for bank in (layer.experts.gate_up_proj, layer.experts.down_proj):
        used = bank.grad.flatten(1).any(-1).nonzero().flatten().tolist()
        assert used == sorted(chosen)


@pytest.mark.hazard(19)
@pytest.mark.parametrize("name", ["dense", "mot", "moma", "moe", "expert_choice", *IN_ATTENTION])
def test_a_batch_of_no_sequences_has_a_loss_of_zero_and_gradients(name):
    model = build(DECLARATIONS[name])
    ids = torch.zeros(0, 12, dtype=torch.int64)
    with unchanged(model.state_dict()):
        out = model(ids, labels=ids)
        out.loss.backward()
    assert out.loss == 0
    assert all(parameter.grad is not None and not parameter.grad.any() for parameter in model.parameters())


KINDS = {
    "top_k": TopKRouter.Config(top_k=2),
    "sigmoid": TopKRouter.Config(top_k=2, score="sigmoid"),
    "expert_choice": ExpertChoiceRouter.Config(capacity_factor=1.5),
    "by_modality": ByModalityRouter.Config(experts=(6,), router=TopKRouter.Config(top_k=3)),
}


@pytest.mark.hazard(20)
@pytest.mark.parametrize("kind", KINDS)
def test_a_router_without_an_opinion_is_finite_and_repeats_itself(kind):
    layer, x, rows = make(6, KINDS[kind]), torch.randn(40, WIDTH), layout(40)
    for module in layer.router.modules():
        if hasattr(module, "scorer"):
            torch.nn.init.zeros_(module.scorer.weight)
    with unchanged(layer, x):
        (y, routing), (again, other) = layer(x, rows), layer(x.clone(), rows)
    assert y.isfinite().all()
    assert torch.equal(y, again)
    assert torch.equal(routing.expert_ids, other.expert_ids)
    assert torch.equal(routing.token_index, other.token_index)
    # a row meets an expert once
    pairs = list(zip(routing.token_index.tolist(), routing.expert_ids.tolist(), strict=True))
    assert len(set(pairs)) == len(pairs)
    y.square().sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in layer.parameters())


@pytest.mark.hazard(20)
@pytest.mark.parametrize("kind", KINDS)
def test_rows_in_another_order_come_out_in_that_order(kind):
    layer, x, rows = make(6, KINDS[kind]), torch.randn(40, WIDTH), layout(40)
    order = torch.randperm(40)
    with unchanged(layer, x):
        found, wanted = layer(x[order], rows)[0], layer(x, rows)[0][order]
    torch.testing.assert_close(found, wanted, atol=1e-6, rtol=1e-5)


@pytest.mark.hazard(20)
@pytest.mark.parametrize("name", ["moe", "moma_top_k", *IN_ATTENTION])
def test_sequences_in_another_order_come_out_in_that_order(name):
    model = build(copy.deepcopy(DECLARATIONS[name]))
    ids = ids_like(model.config, 4)
    order = torch.tensor([2, 0, 3, 1])
    with unchanged(model, ids):
        found, wanted = model(ids[order]).logits, model(ids).logits[order]
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-4)

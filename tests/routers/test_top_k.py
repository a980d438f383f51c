"""Token choice."""

from __future__ import annotations

import pytest
import torch

from omnimoe.layers import RowLayout
from omnimoe.routers import TopKRouter


def route(x: torch.Tensor, num_experts: int = 5, **fields):
    router = TopKRouter.Config(**fields).build(hidden_size=x.shape[1], num_experts=num_experts, num_modalities=1)
    router.scorer.weight.data.normal_()
    rows = RowLayout.build(torch.zeros(1, len(x), dtype=torch.int64), num_keys=1)
    return router, router(x, rows)


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("top_k", [1, 2, 5])
def test_each_row_takes_its_best_experts_by_score(score, normalize, top_k):
    x = torch.randn(7, 4)
    router, routing = route(x, score=score, normalize=normalize, top_k=top_k)
    logits = x @ router.scorer.weight.T
    torch.testing.assert_close(routing.router_logits, logits)
    scores = logits.softmax(-1) if score == "softmax" else logits.sigmoid()
    assert routing.token_index.tolist() == [row for row in range(7) for _ in range(top_k)]
    for row in range(7):
        order = scores[row].argsort(descending=True)[:top_k]
        mine = routing.token_index == row
        assert routing.expert_ids[mine].tolist() == order.tolist()
        weights = scores[row][order]
        weights = weights / weights.sum() if normalize and top_k > 1 else weights
        torch.testing.assert_close(routing.expert_weights[mine], weights)


def test_a_lone_choice_keeps_its_score_so_that_the_router_learns():
    x = torch.randn(7, 4)
    router, routing = route(x, top_k=1, load_balance_coef=0.0)
    routing.expert_weights.sum().backward()
    assert router.scorer.weight.grad.any()
    assert not routing.losses


def test_normalising_over_softmax_equals_softmax_over_the_chosen_logits():
    x = torch.randn(7, 4)
    _, routing = route(x, top_k=3)
    chosen = routing.router_logits.gather(1, routing.expert_ids.view(7, 3))
    torch.testing.assert_close(routing.expert_weights.view(7, 3), chosen.softmax(-1))


def test_losses_carry_their_coefficients_and_sigmoid_scores_are_made_to_sum_to_one():
    x = torch.zeros(8, 4)
    _, routing = route(x, num_experts=4, top_k=4, score="sigmoid", load_balance_coef=0.5, z_loss_coef=0.25)
    assert routing.losses["load_balance"].item() == pytest.approx(0.5)
    assert routing.losses["router_z"].item() == pytest.approx(0.25 * torch.tensor(4.0).log().item() ** 2)


def test_routing_is_in_float32_and_weights_have_the_dtype_of_the_rows():
    x = torch.randn(7, 4).bfloat16()
    router, routing = route(x)
    assert routing.router_logits.dtype == torch.float32
    assert routing.expert_weights.dtype == torch.bfloat16
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rows = RowLayout.build(torch.zeros(1, 7, dtype=torch.int64), num_keys=1)
        again = router(x.float(), rows)
    assert again.router_logits.dtype == torch.float32
    assert torch.equal(again.router_logits, routing.router_logits)


def test_no_rows_route_nowhere_with_finite_losses():
    _, routing = route(torch.randn(0, 4), z_loss_coef=0.1)
    assert len(routing.token_index) == 0
    assert all(loss == 0 for loss in routing.losses.values())


def test_a_routing_depends_on_its_row_alone():
    x = torch.randn(9, 4)
    router, whole = route(x)
    rows = RowLayout.build(torch.zeros(1, 1, dtype=torch.int64), num_keys=1)
    for row in range(9):
        alone = router(x[row : row + 1], rows)
        mine = whole.token_index == row
        assert torch.equal(alone.expert_ids, whole.expert_ids[mine])
        torch.testing.assert_close(alone.expert_weights, whole.expert_weights[mine])

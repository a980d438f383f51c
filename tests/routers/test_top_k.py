"""Token choice."""

from __future__ import annotations

import pytest
import torch

from omnimoe.config import ConfigError
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


@pytest.mark.parametrize(("threshold", "wanted"), [(0.5, 0.4), (0.2, 1.0)])
def test_a_later_choice_is_drawn_by_its_share_in_training(threshold, wanted):
    """Two experts at 0.8 and 0.2: GShard sends a row to the second with probability 0.4, ST-MoE always."""
    torch.manual_seed(0)
    config = TopKRouter.Config(later_choice_threshold=threshold)
    router = config.build(hidden_size=2, num_experts=2, num_modalities=1)
    router.scorer.weight.data.copy_(torch.tensor([[0.8], [0.2]]).log().expand(2, 2) / 2)
    rows = RowLayout.build(torch.zeros(1, 4000, dtype=torch.int64), num_keys=1)
    ids = router.train()(torch.ones(4000, 2), rows).expert_ids.view(-1, 2)
    assert (ids[:, 0] == 0).all()
    assert float((ids[:, 1] == 1).float().mean()) == pytest.approx(wanted, abs=0.03)
    assert (router.eval()(torch.ones(4000, 2), rows).expert_ids >= 0).all()


@pytest.mark.parametrize("top_p", [0.3, 0.7, 1.0])
@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
def test_top_p_keeps_the_fewest_experts_that_reach_the_share(top_p, score):
    x = torch.randn(30, 4)
    router, routing = route(x, top_k=5, top_p=top_p, score=score)
    logits = x @ router.scorer.weight.T
    scores = logits.softmax(-1) if score == "softmax" else logits.sigmoid()
    probs = scores / scores.sum(-1, keepdim=True)
    for row in range(30):
        held, wanted = 0.0, []
        for expert in probs[row].argsort(descending=True).tolist():
            if held < top_p:
                wanted.append(expert)
                held += probs[row, expert].item()
        ids = routing.expert_ids.view(30, 5)[row]
        assert ids[ids >= 0].tolist() == wanted
        weights = routing.expert_weights.view(30, 5)[row][: len(wanted)]
        torch.testing.assert_close(weights, scores[row, wanted] / scores[row, wanted].sum())


def test_noise_and_jitter_are_drawn_in_training_alone_and_the_logits_stay_clean():
    x = torch.randn(50, 4)
    for fields in ({"noise": 1.0}, {"input_jitter": 0.9}):
        router, routing = route(x, **fields)
        again = router(x, RowLayout.build(torch.zeros(1, 50, dtype=torch.int64), num_keys=1))
        assert not torch.equal(routing.expert_ids, again.expert_ids)
        if "noise" in fields:
            assert torch.equal(routing.router_logits, again.router_logits)
        router.eval()
        rows = RowLayout.build(torch.zeros(1, 50, dtype=torch.int64), num_keys=1)
        assert torch.equal(router(x, rows).expert_ids, router(x, rows).expert_ids)


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"score": "relu"}, "known: softmax, sigmoid, sqrt_softplus"),
        ({"top_k": 6}, "exceeds the 5 experts"),
        ({"top_k": 0}, "at least 1, got 0"),
        ({"num_groups": 2}, "equal groups"),
        ({"num_groups": 5, "group_score": "best", "top_k": 2}, "1 of 5 groups"),
        ({"num_groups": 1, "num_groups_kept": 2}, "must be 1 to num_groups 1"),
        ({"top_p": 1.5}, "at most 1, got 1.5"),
        ({"capacity_factor": 0.0}, "must be finite and positive, got 0.0"),
        ({"capacity": 0}, "must be finite and positive, got 0; None sets no limit"),
        ({"normalize_kept": True}, "nothing is; set capacity_factor"),
        ({"routed_scaling_factor": 0.0}, "routed_scaling_factor must be finite and positive, got 0.0"),
        ({"capacity_pool": "image"}, "known: batch, sequence"),
        ({"capacity_priority": "length"}, "known: position, score"),
        ({"input_jitter": 1.0}, "below 1"),
        ({"later_choice_threshold": 0.0}, "must be positive, got 0.0"),
    ],
)
def test_what_does_not_fit_is_refused(fields, told):
    with pytest.raises(ConfigError, match=told):
        route(torch.randn(2, 4), **fields)


def test_weights_that_stay_in_float32():
    config = TopKRouter.Config(top_k=2, keep_float32=True, logit_bias=True)
    router = config.build(hidden_size=8, num_experts=4, num_modalities=1)
    with torch.no_grad():
        router.scorer.weight.add_(1e-6)
    before = router.scorer.weight.clone()
    for change in (torch.nn.Module.bfloat16, torch.nn.Module.half, lambda held: held.to(torch.float64)):
        change(router)
        assert router.scorer.weight.dtype == router.scorer.bias.dtype == torch.float32
        assert torch.equal(router.scorer.weight, before), "nothing was rounded on the way"
    plain = TopKRouter.Config(top_k=2).build(hidden_size=8, num_experts=4, num_modalities=1)
    assert plain.bfloat16().scorer.weight.dtype == torch.bfloat16
    assert router.to("meta").scorer.weight.is_meta


def test_the_least_that_scores_are_divided_by():
    x = torch.randn(3, 8)
    router, routing = route(x, num_experts=16, top_k=2, normalize_min=0.9)
    scores = torch.softmax(router.scorer(x), -1).topk(2).values
    wanted = scores / scores.sum(-1, keepdim=True).clamp_min(0.9)
    torch.testing.assert_close(routing.expert_weights.view(3, 2), wanted)
    with pytest.raises(ConfigError, match="normalize_min must be at least 0"):
        TopKRouter.Config(normalize_min=-1.0)

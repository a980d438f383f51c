"""Expert choice: exact load, and its cut-off where a row may not look at others."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from omnimoe.config import ConfigError
from omnimoe.layers import RowLayout
from omnimoe.routers import ExpertChoiceRouter, ExpertThresholdRouter


def router_of(width: int = 4, num_experts: int = 3, **fields) -> ExpertChoiceRouter:
    router = ExpertChoiceRouter.Config(**fields).build(hidden_size=width, num_experts=num_experts, num_modalities=1)
    router.scorer.weight.data.normal_(generator=torch.Generator().manual_seed(0))
    return router


def rows_of(count: int, **fields) -> RowLayout:
    return RowLayout.build(torch.zeros(1, count, dtype=torch.int64), num_keys=1, **fields)


@settings(max_examples=25)
@given(count=st.integers(0, 40), num_experts=st.integers(1, 7), factor=st.sampled_from([0.3, 1.0, 1.5, 2.0, 9.0]))
def test_every_expert_takes_exactly_its_capacity_of_different_rows(count, num_experts, factor):
    router = router_of(num_experts=num_experts, capacity_factor=factor)
    x = torch.randn(count, 4, generator=torch.Generator().manual_seed(count))
    routing = router(x, rows_of(count))
    capacity = min(count, math.ceil(factor * count / num_experts))
    load = torch.bincount(routing.expert_ids, minlength=num_experts)
    assert load.tolist() == [capacity] * num_experts
    assert len(routing.token_index) == capacity * num_experts
    for expert in range(num_experts):
        mine = routing.token_index[routing.expert_ids == expert]
        assert len(mine.unique()) == capacity


@pytest.mark.parametrize("score", ["sigmoid", "softmax"])
def test_the_best_rows_are_taken_with_their_scores(score):
    router, x = router_of(score=score), torch.randn(9, 4)
    routing = router(x, rows_of(9))
    logits = x @ router.scorer.weight.T
    scores = logits.sigmoid() if score == "sigmoid" else logits.softmax(-1)
    for expert in range(3):
        mine = routing.expert_ids == expert
        best = scores[:, expert].argsort(descending=True)[:3]
        assert routing.token_index[mine].tolist() == best.tolist()
        torch.testing.assert_close(routing.expert_weights[mine], scores[best, expert])
        torch.testing.assert_close(routing.cutoff[expert], scores[best, expert].min())
    routing.expert_weights.sum().backward()
    assert router.scorer.weight.grad.any()


def test_without_looking_around_a_row_goes_where_its_score_reaches_the_cutoff():
    router, x = router_of(), torch.randn(9, 4)
    router.cutoff.copy_(torch.tensor([0.2, 0.5, 0.9]))
    routing = router(x, rows_of(9, routes_causally=True))
    scores = (x @ router.scorer.weight.T).sigmoid()
    wanted = {(row, expert) for row in range(9) for expert in range(3) if scores[row, expert] >= router.cutoff[expert]}
    assert set(zip(routing.token_index.tolist(), routing.expert_ids.tolist(), strict=True)) == wanted
    torch.testing.assert_close(routing.expert_weights, scores[routing.token_index, routing.expert_ids])
    assert routing.cutoff is None
    assert 0 < len(wanted) < 27


def test_the_cutoff_is_a_running_mean_and_ignores_what_was_not_seen():
    router = router_of(cutoff_momentum=0.75)
    routing = router(torch.randn(9, 4), rows_of(9))
    router.update(routing)
    torch.testing.assert_close(router.cutoff, 0.75 * torch.full((3,), 0.5) + 0.25 * routing.cutoff)
    before = router.cutoff.clone()
    router.update(router(torch.randn(0, 4), rows_of(0)))
    router.update(router(torch.randn(4, 4), rows_of(4, routes_causally=True)))
    assert torch.equal(router.cutoff, before)


def test_after_training_the_cutoff_gives_about_the_capacity():
    router = router_of(cutoff_momentum=0.9, capacity_factor=1.0)
    for _ in range(60):
        router.update(router(torch.randn(300, 4), rows_of(300)))
    routing = router(torch.randn(3000, 4), rows_of(3000, routes_causally=True))
    load = torch.bincount(routing.expert_ids, minlength=3) / 1000
    assert ((load > 0.85) & (load < 1.15)).all()


@pytest.mark.parametrize("pool", ["batch", "ranks"])
def test_the_cutoff_is_of_scores_without_noise(pool):
    """Noise moves which rows are best, and the best of noisy scores score higher; what is routed alone has none."""
    router = router_of(cutoff_momentum=0.9, capacity_factor=1.0, gumbel_noise=1.0, pool=pool)
    for _ in range(60):
        x = torch.randn(300, 4)
        routing = router(x, rows_of(300))
        router.update(routing)
    lowest = (x @ router.scorer.weight.T).sigmoid().topk(100, dim=0).values[-1]
    torch.testing.assert_close(routing.cutoff, lowest)
    alone = router.eval()(torch.randn(3000, 4), rows_of(3000, routes_causally=True))
    load = torch.bincount(alone.expert_ids, minlength=3) / 1000
    assert ((load > 0.85) & (load < 1.15)).all()


@pytest.mark.parametrize(("score", "start"), [("sigmoid", 0.5), ("softmax", 1 / 3)])
def test_the_cutoff_starts_at_the_score_of_an_untrained_router(score, start):
    torch.testing.assert_close(router_of(score=score).cutoff, torch.full((3,), start))


def test_the_cutoff_stays_in_float32_whatever_the_model_is_cast_to():
    """In bfloat16 a momentum of 0.99 would never move it."""
    router = router_of().to(torch.bfloat16)
    assert router.scorer.weight.dtype == torch.bfloat16
    assert router.cutoff.dtype == torch.float32
    before = router.cutoff.clone()
    router.update(router(torch.randn(9, 4).bfloat16(), rows_of(9)))
    assert (router.cutoff != before).all()


def threshold(**fields) -> ExpertThresholdRouter:
    config = ExpertThresholdRouter.Config(**{"warmup_steps": 2, "cutoff_momentum": 0.5, **fields})
    router = config.build(hidden_size=4, num_experts=3, num_modalities=1)
    router.scorer.weight.data.normal_(generator=torch.Generator().manual_seed(0))
    return router


def test_the_threshold_is_expert_choice_while_it_warms_up_and_then_a_row_alone():
    router, x = threshold().train(), torch.randn(9, 4)
    choice = router_of()
    choice.scorer.weight.data.copy_(router.scorer.weight)

    def pairs(routing):
        return set(zip(routing.token_index.tolist(), routing.expert_ids.tolist(), strict=True))

    for _ in range(2):
        routing = router(x, rows_of(9))
        wanted = choice(x, rows_of(9))
        assert pairs(routing) == pairs(wanted)
        torch.testing.assert_close(routing.cutoff, wanted.cutoff)
        router.update(routing)
    torch.testing.assert_close(router.cutoff, 0.25 * torch.full((3,), 0.5) + 0.75 * routing.cutoff)
    whole = router(x, rows_of(9))
    scores = (x @ router.scorer.weight.T).sigmoid()
    assert pairs(whole) == {(int(row), int(expert)) for row, expert in (scores >= router.cutoff).nonzero()}
    for row in range(9):
        alone = router(x[row : row + 1], rows_of(1))
        assert set(alone.expert_ids.tolist()) == {expert for held, expert in pairs(whole) if held == row}


def test_the_threshold_looks_at_nothing_else_in_evaluation_from_the_start():
    router, x = threshold().eval(), torch.randn(9, 4)
    before = router.cutoff.clone()
    routing = router(x, rows_of(9))
    assert routing.cutoff is None
    router.update(routing)
    assert torch.equal(router.cutoff, before)
    assert int(router.steps) == 0
    assert router.config.is_causal
    with pytest.raises(ConfigError, match="routes by its cut-off"):
        threshold(causal_form="auxiliary")


def test_the_auxiliary_router_learns_what_the_batch_chose_and_moves_nothing_else():
    torch.manual_seed(0)
    router = router_of(16, causal_form="auxiliary")
    optimizer = torch.optim.Adam(router.auxiliary.parameters(), lr=0.02)
    for _ in range(200):
        routing = router(torch.randn(120, 16), rows_of(120))
        optimizer.zero_grad()
        routing.losses["auxiliary"].backward()
        assert router.scorer.weight.grad is None
        optimizer.step()
    x = torch.randn(300, 16)
    chosen, alone = router(x, rows_of(300)), router(x, rows_of(300, routes_causally=True))
    wanted, found = torch.zeros(300, 3), torch.zeros(300, 3)
    wanted[chosen.token_index, chosen.expert_ids] = 1
    found[alone.token_index, alone.expert_ids] = 1
    assert (wanted == found).float().mean() > 0.9
    scores = (x @ router.scorer.weight.T).sigmoid()
    torch.testing.assert_close(alone.expert_weights, scores[alone.token_index, alone.expert_ids])


def test_without_a_causal_form_a_row_is_not_routed_alone():
    router = router_of(causal_form="none")
    assert not router.config.has_causal_form
    with pytest.raises(ValueError, match="causal_form='auxiliary'"):
        router(torch.randn(3, 4), rows_of(3, routes_causally=True))


def test_gumbel_noise_is_drawn_in_training_alone():
    router, x = router_of(gumbel_noise=1.0), torch.randn(40, 4)
    first, second = router.train()(x, rows_of(40)), router(x, rows_of(40))
    assert not torch.equal(first.token_index, second.token_index)
    assert torch.equal(router.eval()(x, rows_of(40)).token_index, router(x, rows_of(40)).token_index)


def test_the_noise_is_the_difference_of_two_gumbel_draws_which_is_logistic():
    """Every row is taken and every logit is zero, so weights show nothing but the noise."""
    torch.manual_seed(0)
    router = router_of(gumbel_noise=0.5, capacity_factor=3.0).train()
    router.scorer.weight.data.zero_()
    routing = router(torch.randn(20_000, 4), rows_of(20_000))
    assert len(routing.expert_weights) == 60_000
    noise = routing.expert_weights.detach().double().logit() / 0.5
    for share in (0.01, 0.1, 0.25, 0.5, 0.75, 0.9, 0.99):
        error = math.sqrt(1 / (share * (1 - share) * 60_000))  # of a quantile of that many draws
        assert float(noise.quantile(share)) == pytest.approx(math.log(share / (1 - share)), abs=4 * error)
    assert float(noise.var()) == pytest.approx(math.pi**2 / 3, rel=0.03)
    gumbel = -(-torch.rand(2, 60_000).double().clamp_min(1e-9).log()).log()
    drawn = (gumbel[0] - gumbel[1]).sort().values
    assert (noise.sort().values - drawn)[600:-600].abs().max() < 0.2
    table = torch.zeros(20_000, 3, dtype=torch.float64).index_put((routing.token_index, routing.expert_ids), noise)
    between = torch.corrcoef(table.T)
    assert (between - torch.eye(3)).abs().max() < 0.03, "each expert draws its own"


@pytest.mark.parametrize("score", ["sigmoid", "softmax"])
def test_it_is_the_loop_over_experts(score):
    """Expert by expert, row by row, each takes the best that is left until it is full."""
    router, x = router_of(score=score, capacity_factor=1.5), torch.randn(11, 4)
    scores = [(x @ router.scorer.weight.T)[row] for row in range(11)]
    scores = [row.sigmoid() if score == "sigmoid" else row.exp() / row.exp().sum() for row in scores]
    wanted = torch.zeros(11, 3)
    for expert in range(3):
        left = list(range(11))
        for _ in range(math.ceil(1.5 * 11 / 3)):
            best = max(left, key=lambda row: scores[row][expert].item())
            wanted[best, expert] = scores[best][expert]
            left.remove(best)
    routing = router(x, rows_of(11))
    found = torch.zeros(11, 3)
    found[routing.token_index, routing.expert_ids] = routing.expert_weights
    torch.testing.assert_close(found, wanted)

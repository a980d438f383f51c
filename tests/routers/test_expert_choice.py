"""Expert choice: exact load, and its cut-off where a row may not look at others."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from omnimoe.layers import RowLayout
from omnimoe.routers import ExpertChoiceRouter


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

"""A choice among all rows, as it is made over processes; over two of them: test_ranks.py."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from omnimoe.layers import RowLayout
from omnimoe.routers import DepthRouter, ExpertChoiceRouter
from omnimoe.routers.pool import best_of_ranks, share_of


@settings(max_examples=30)
@given(rows=st.integers(0, 12), spare=st.integers(0, 5), factor=st.sampled_from([0.1, 0.5, 1.0, 1.7, 9.0]))
def test_each_expert_takes_its_best_rows_of_those_that_count(rows, spare, factor):
    generator = torch.Generator().manual_seed(rows)
    scores, counted = torch.randn(rows, 3, generator=generator), torch.rand(rows, generator=generator) > 0.3
    for seen in (None, counted):
        taken, cutoff = best_of_ranks(scores, seen, share_of(factor, 3), rows + spare)
        own = list(range(rows)) if seen is None else seen.nonzero().flatten().tolist()
        capacity = min(len(own), math.ceil(len(own) * share_of(factor, 3)))
        for expert in range(3):
            best = sorted(own, key=lambda row: -scores[row, expert].item())[:capacity]
            assert sorted(best) == taken[:, expert].nonzero().flatten().tolist()
            lowest = min((scores[row, expert].item() for row in best), default=math.nan)
            assert cutoff[expert].item() == pytest.approx(lowest, nan_ok=True)


@pytest.mark.parametrize("score", ["sigmoid", "softmax"])
def test_in_one_process_all_ranks_are_the_batch(score):
    x = torch.randn(14, 4)
    rows = RowLayout.build(torch.zeros(2, 7, dtype=torch.int64), num_keys=1)
    found = []
    for pool in ("batch", "ranks"):
        config = ExpertChoiceRouter.Config(score=score, pool=pool, causal_form="auxiliary")
        router = config.build(hidden_size=4, num_experts=3, num_modalities=1)
        router.scorer.weight.data.normal_(generator=torch.Generator().manual_seed(0))
        torch.nn.init.ones_(router.auxiliary.inner.weight)
        torch.nn.init.ones_(router.auxiliary.outer.weight)
        routing = router(x, rows)
        weights = torch.zeros(14, 3).index_put((routing.token_index, routing.expert_ids), routing.expert_weights)
        weights.square().sum().backward()
        found.append((weights, routing.cutoff, routing.losses["auxiliary"], router.scorer.weight.grad))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)


def test_in_one_process_the_depth_of_all_ranks_is_that_of_the_batch():
    x, found = torch.randn(14, 4), []
    rows = RowLayout.build(torch.zeros(2, 7, dtype=torch.int64), num_keys=1)
    for pool in ("batch", "ranks"):
        router = DepthRouter.Config(pool=pool).build(hidden_size=4)
        router.scorer.weight.data.normal_(generator=torch.Generator().manual_seed(0))
        found.append(router(x, rows))
    assert torch.equal(found[0][0], found[1][0])
    assert torch.equal(found[0][1], found[1][1])

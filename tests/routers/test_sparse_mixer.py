"""SparseMixer's weights: alike, but among experts that come near each other."""

from __future__ import annotations

import pytest
import torch

from omnimoe.config import ConfigError
from omnimoe.layers import RowLayout
from omnimoe.routers import SparseMixerRouter, TopKRouter


def routed(logits: list[list[float]], shared: int = 0, **fields):
    """The routing of rows whose logits are these."""
    held = torch.tensor(logits)
    router = SparseMixerRouter.Config(**fields).build(
        hidden_size=held.shape[1],
        num_experts=held.shape[1] - shared,
        num_modalities=1,
        **({"num_gated_experts": shared} if shared else {}),
    )
    with torch.no_grad():
        router.scorer.weight.copy_(torch.eye(held.shape[1]))
    rows = RowLayout.build(torch.zeros(1, len(held), dtype=torch.int64), num_keys=1)
    found = router(held, rows)
    return found.expert_ids.view(len(held), -1), found.expert_weights.view(len(held), -1), found


def test_experts_apart_count_alike_however_good():
    ids, weights, _ = routed([[5.0, 1.0, 3.0, -2.0]], top_k=3)
    assert ids.tolist() == [[0, 2, 1]]
    torch.testing.assert_close(weights, torch.full((1, 3), 1 / 3), atol=1e-6, rtol=0)


def test_an_expert_shares_with_those_near_it_that_are_left():
    ids, weights, _ = routed([[2.0, 2.01, 0.0, 1.0]], top_k=2)
    assert ids.tolist() == [[1, 0]]
    first = torch.tensor([2.01, 2.0]).softmax(0)[0]  # the second is alone when its turn comes
    torch.testing.assert_close(weights[0], torch.stack((first, torch.tensor(1.0))) / (first + 1), atol=1e-6, rtol=0)
    _, apart, _ = routed([[2.0, 2.01, 0.0, 1.0]], top_k=2, nearness=0.0)
    torch.testing.assert_close(apart, torch.full((1, 2), 0.5), atol=1e-6, rtol=0)


def test_choices_that_are_not_needed_weigh_nothing_and_leave_gradients_whole():
    ids, weights, found = routed([[9.0, 0.0, 0.0], [0.0, 0.0, 0.0]], top_k=3, top_p=0.6, load_balance_coef=0.0)
    assert ids.tolist()[0] == [0, -1, -1]
    assert weights[0].tolist() == pytest.approx([1.0, 0.0, 0.0], abs=1e-5)
    assert sorted(ids[1].tolist()) == [-1, *sorted(ids[1][:2].tolist())]
    found.expert_weights.square().sum().backward()
    assert found.expert_weights.isfinite().all()


def test_shared_experts_take_their_part_of_one_softmax():
    ids, weights, found = routed([[3.0, 1.0, 0.0, 2.0, 1.5]], shared=2, top_k=2)
    assert ids.tolist() == [[0, 1]]
    joint = torch.tensor([3.0, 1.0, 2.0, 1.5]).softmax(0)
    torch.testing.assert_close(found.shared_weights[0], joint[2:], atol=1e-6, rtol=0)
    torch.testing.assert_close(weights[0], joint[:2].sum().expand(2) / 2, atol=1e-6, rtol=0)


def test_gradients_reach_the_scorer_through_what_is_near():
    router = SparseMixerRouter.Config(top_k=1, nearness=0.5, load_balance_coef=0.0).build(
        hidden_size=3, num_experts=3, num_modalities=1
    )
    with torch.no_grad():
        router.scorer.weight.copy_(torch.eye(3))
    rows = RowLayout.build(torch.zeros(1, 1, dtype=torch.int64), num_keys=1)
    assert router.scorer.weight.requires_grad
    out = router(torch.tensor([[1.0, 0.9, 0.0]]), rows)
    assert float(out.expert_weights.detach()[0]) == pytest.approx(1.0, abs=1e-4), "of one choice the weight is one"
    assert isinstance(router, TopKRouter)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"nearness": -0.1}, "nearness must be finite and not negative, got -0.1"),
        ({"score": "sigmoid"}, "leave score 'sigmoid'"),
    ],
)
def test_what_it_cannot_be(change, told):
    with pytest.raises(ConfigError, match=told):
        SparseMixerRouter.Config(**change)

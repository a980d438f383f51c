"""Two levels: groups of experts by modality, a router inside each."""

from __future__ import annotations

import pytest
import torch

from omnimoe.layers import RowLayout
from omnimoe.routers import ByModalityRouter, ExpertChoiceRouter, Routing, TopKRouter

KEYS = torch.tensor([[0, 1, 2, 1, 0, 0, 1, 2, 1, 1]])
TOP = TopKRouter.Config(top_k=1, normalize=False)


def build(experts=(2, 3, 1), router=None, **fields) -> ByModalityRouter:
    config = ByModalityRouter.Config(experts=experts, router=router or ExpertChoiceRouter.Config(), **fields)
    made = config.build(hidden_size=4, num_experts=sum(experts), num_modalities=3)
    for parameter in made.parameters():
        parameter.data.normal_()
    return made


def pairs(routing, keep=None) -> dict:
    found = {}
    for row, expert, weight in zip(
        routing.token_index.tolist(), routing.expert_ids.tolist(), routing.expert_weights, strict=True
    ):
        if keep is None or row in keep:
            found[row, expert] = weight.item()
    return found


@pytest.mark.parametrize("inner", [None, TOP], ids=["expert_choice", "top_k"])
def test_a_row_only_meets_experts_of_its_modality(inner):
    router, rows = build(router=inner), RowLayout.build(KEYS, num_keys=3)
    routing = router(torch.randn(10, 4), rows)
    group = torch.tensor([0, 0, 1, 1, 1, 2])
    assert torch.equal(group[routing.expert_ids], rows.key_ids[routing.token_index])


@pytest.mark.parametrize("inner", [None, TOP], ids=["expert_choice", "top_k"])
def test_rows_of_another_modality_and_padding_change_nothing(inner):
    router, rows = build(router=inner), RowLayout.build(KEYS, num_keys=3)
    x = torch.randn(10, 4)
    images = rows.where(1)
    wanted = router(x, rows)
    changed = x.clone()
    changed[rows.where(0)] = torch.randn(3, 4)
    found = router(changed, rows)
    keep = set(images.tolist())
    assert pairs(found, keep) == pairs(wanted, keep)

    # the images alone, no other modality in the batch
    alone_rows = RowLayout.build(torch.ones(1, 5, dtype=torch.int64), num_keys=3)
    alone = router(x[images], alone_rows)
    shifted = {(row - int(images[0]), expert): weight for (row, expert), weight in pairs(wanted, keep).items()}
    assert pairs(alone) == pytest.approx(shifted)

    valid = torch.ones(1, 10, dtype=torch.bool)
    valid[0, 3] = False
    padded = RowLayout.build(KEYS, num_keys=3, valid=valid)
    rest = router(padded.to_rows(rows.to_time(x)), padded)
    texts = set(rows.where(0).tolist())
    assert pairs(rest, texts) == pytest.approx(pairs(wanted, texts))


def test_the_load_inside_a_group_is_exact():
    rows = RowLayout.build(KEYS, num_keys=3)
    routing = build()(torch.randn(10, 4), rows)
    # 3 texts over 2 experts, 5 images over 3, 2 speech over a lone expert
    assert torch.bincount(routing.expert_ids, minlength=6).tolist() == [2, 2, 2, 2, 2, 2]
    assert len(routing.token_index) == 12


def test_a_lone_expert_is_plain_unless_it_is_to_be_gated():
    rows, x = RowLayout.build(KEYS, num_keys=3), torch.randn(10, 4)
    plain = build()
    assert plain.routers[2] is None
    mine = plain(x, rows)
    assert torch.equal(mine.expert_weights[mine.expert_ids == 5], torch.ones(2))
    gated = build(gate_lone_expert=True)
    mine = gated(x, rows)
    speech = rows.where(2)
    wanted = torch.sigmoid(x[speech] @ gated.routers[2].scorer.weight.T).squeeze(1)
    found = dict(
        zip(mine.token_index[mine.expert_ids == 5].tolist(), mine.expert_weights[mine.expert_ids == 5], strict=True)
    )
    for row, weight in zip(speech.tolist(), wanted, strict=True):
        torch.testing.assert_close(found[row], weight)


def test_logits_of_experts_out_of_reach_are_minus_infinity():
    rows, x = RowLayout.build(KEYS, num_keys=3), torch.randn(10, 4)
    router = build()
    logits = router(x, rows).router_logits
    finite = logits.isfinite()
    assert finite[rows.where(0)].tolist() == [[True, True, False, False, False, False]] * 3
    assert finite[rows.where(1)].tolist() == [[False, False, True, True, True, False]] * 5
    assert not finite[rows.where(2)].any()
    torch.testing.assert_close(logits[rows.where(1), 2:5], x[rows.where(1)] @ router.routers[1].scorer.weight.T)


@pytest.mark.parametrize("inner", [None, TOP], ids=["expert_choice", "top_k"])
def test_an_empty_modality_leaves_finite_weights_and_zero_gradients(inner):
    router = build(router=inner)
    rows = RowLayout.build(torch.zeros(1, 6, dtype=torch.int64), num_keys=3)
    routing = router(torch.randn(6, 4), rows)
    assert set(routing.expert_ids.tolist()) <= {0, 1}
    (routing.expert_weights.sum() + sum(routing.losses.values())).backward()
    grads = {name: parameter.grad for name, parameter in router.named_parameters()}
    assert grads["routers.0.scorer.weight"].any()
    assert torch.equal(grads["routers.1.scorer.weight"], torch.zeros(3, 4))


def test_balance_losses_are_weighted_by_the_rows_of_their_group():
    router, rows, x = build(router=TOP), RowLayout.build(KEYS, num_keys=3), torch.randn(10, 4)
    loss = router(x, rows).losses["load_balance"]
    wanted = 0.0
    for key, count in ((0, 3), (1, 5)):
        inner = router.routers[key](x[rows.where(key)], rows.span(key))
        wanted = wanted + inner.losses["load_balance"] * count / 10
    torch.testing.assert_close(loss, wanted)


def test_an_update_reaches_each_groups_own_router():
    router, rows = build(), RowLayout.build(KEYS, num_keys=3)
    routing = router(torch.randn(10, 4), rows)
    assert routing.cutoff.isnan().tolist() == [False] * 5 + [True]
    router.update(routing)
    for key, part in ((0, routing.cutoff[:2]), (1, routing.cutoff[2:5])):
        torch.testing.assert_close(router.routers[key].cutoff, 0.99 * torch.full_like(part, 0.5) + 0.01 * part)
    before = [router.routers[key].cutoff.clone() for key in (0, 1)]
    causal = RowLayout.build(KEYS, num_keys=3, routes_causally=True)
    router.update(router(torch.randn(10, 4), causal))
    assert all(torch.equal(router.routers[key].cutoff, kept) for key, kept in enumerate(before))


class CountingRouter(TopKRouter):
    """Counts the load of its own experts outside of the gradient, as routers with a balancing bias do."""

    def update(self, routing: Routing) -> None:
        self.seen = routing
        self.load = torch.bincount(routing.expert_ids, minlength=self.num_experts)


@pytest.mark.parametrize("top_k", [1, 2])
def test_an_update_speaks_of_rows_and_experts_of_the_group_alone(top_k):
    inner = CountingRouter.Config(top_k=top_k)
    router, rows, x = build((2, 3, 4), router=inner), RowLayout.build(KEYS, num_keys=3), torch.randn(10, 4)
    routing = router(x, rows)
    router.update(routing)
    for key, (start, stop) in enumerate(rows.key_spans()):
        part = router.routers[key]
        wanted = part(x[start:stop], rows.span(key))
        assert pairs(part.seen) == pytest.approx(pairs(wanted))
        assert torch.equal(part.load, torch.bincount(wanted.expert_ids, minlength=part.num_experts))
        torch.testing.assert_close(part.seen.router_logits, wanted.router_logits)

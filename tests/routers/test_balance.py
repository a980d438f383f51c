"""Losses as a router's settings, and the bias that moves against load: where it acts, and where it must not."""

from __future__ import annotations

import math

import pytest
import torch

from omnimoe.config import ConfigError
from omnimoe.layers import RowLayout
from omnimoe.routers import (
    ByModalityRouter,
    Routing,
    TopKRouter,
    entropy_losses,
    importance_loss,
    join_routings,
    load_balance_loss,
    load_loss,
    mutual_information,
    orthogonality_loss,
)

KEYS = torch.tensor([[0, 1, 1, 0, 1, 1], [1, 1, 0, 0, 0, 1]])


def make(num_experts: int = 4, num_keys: int = 2, free=(), **fields) -> TopKRouter:
    given = {"free_experts": free} if free else {}
    config = TopKRouter.Config(**{"load_balance_coef": 0.0, **fields})
    router = config.build(hidden_size=6, num_experts=num_experts, num_modalities=num_keys, **given)
    router.scorer.weight.data.normal_()
    return router


def rows_of(keys: torch.Tensor = KEYS, **fields) -> RowLayout:
    return RowLayout.build(keys, num_keys=2, **{"sort": False, **fields})


def routed(ids: list[int], keys: list[int] | None = None) -> Routing:
    """A routing of one choice a row."""
    chosen = torch.tensor(ids, dtype=torch.int64)
    held = None if keys is None else torch.tensor(keys)
    return Routing(torch.arange(len(ids)), chosen, torch.ones(len(ids)), key_ids=held)


@pytest.mark.parametrize("kind", ["shared", "key"])
def test_the_bias_moves_the_choice_but_no_weight_and_has_no_gradient(kind):
    router, rows, x = make(expert_bias=kind, normalize=False), rows_of(), torch.randn(12, 6)
    before = router(x, rows)
    router.expert_bias[..., 2] = 5.0
    after = router(x, rows)
    assert (after.expert_ids.view(12, 2) == 2).any(-1).all()
    assert not (before.expert_ids.view(12, 2) == 2).any(-1).all()
    scores = after.router_logits.softmax(-1)
    torch.testing.assert_close(after.expert_weights, scores[after.token_index, after.expert_ids])
    assert torch.equal(before.router_logits, after.router_logits)
    after.expert_weights.sum().backward()
    assert "expert_bias" in dict(router.named_buffers())
    assert not router.expert_bias.requires_grad


def test_a_bias_for_each_key_moves_that_keys_rows_alone():
    router, rows, x = make(expert_bias="key"), rows_of(), torch.randn(12, 6)
    before = router(x, rows).expert_ids.view(12, 2)
    router.expert_bias[1, 3] = 5.0
    after = router(x, rows).expert_ids.view(12, 2)
    own = rows.key_ids == 1
    assert torch.equal(before[~own], after[~own])
    assert (after[own] == 3).any(-1).all()


def test_the_sign_update_steps_by_its_rate_towards_the_mean_load():
    router = make(expert_bias="shared", expert_bias_rate=0.1)
    router.update(routed([0, 0, 0, 1, 2, 2, 3, 3]))
    torch.testing.assert_close(router.expert_bias, torch.tensor([-0.1, 0.1, 0.0, 0.0]))
    router.update(routed([]))
    torch.testing.assert_close(router.expert_bias, torch.tensor([-0.1, 0.1, 0.0, 0.0]))


def test_the_sign_update_of_each_key_counts_that_keys_rows():
    router = make(expert_bias="key", expert_bias_rate=0.1)
    router.update(routed([0, 0, 1, 2, 3, 3], keys=[0, 0, 0, 0, 0, 0]))
    torch.testing.assert_close(router.expert_bias[0], torch.tensor([-0.1, 0.1, 0.1, -0.1]))
    assert not router.expert_bias[1].any()


def test_the_proportional_update_is_the_published_one_and_leaves_free_experts_alone():
    """LongCat-Flash: rate times (wanted experts a token / choices a token / experts - share of choices)."""
    fields = {"expert_bias_update": "proportional", "expert_bias_rate": 0.5, "top_k": 3, "expert_bias_target": 2.0}
    router = make(free=("identity",) * 2, expert_bias="shared", **fields)
    ids = [0, 0, 1, 4, 5, 3, 2, 0, 4]
    router.update(routed(ids))
    share = torch.bincount(torch.tensor(ids), minlength=6)[:4] / len(ids)
    torch.testing.assert_close(router.expert_bias[:4], 0.5 * (2 / 3 / 4 - share))
    assert not router.expert_bias[4:].any()


def test_updates_balance_a_router_that_would_collapse():
    torch.manual_seed(0)
    router, x = make(top_k=1, expert_bias="shared", expert_bias_rate=0.02), torch.randn(300, 6) + 0.5
    router.scorer.weight.data[0] += 1.0
    rows = rows_of(torch.zeros(1, 300, dtype=torch.int64))

    def busiest() -> float:
        load = torch.bincount(router(x, rows).expert_ids, minlength=4)
        return float(load.max() / load.float().mean())

    before = busiest()
    for _ in range(150):
        router.update(router(x, rows))
    assert before > 1.5
    assert busiest() < 1.15


def test_a_step_over_several_batches_moves_the_bias_once():
    one, two = routed([0, 0, 1], keys=[0, 1, 0]), routed([1, 1, 1, 2], keys=[1, 1, 0, 0])
    for kind in ("shared", "key"):
        joined, whole = make(expert_bias=kind), make(expert_bias=kind)
        joined.update(join_routings([(one,), (two,)])[0])
        whole.update(routed([0, 0, 1, 1, 1, 1, 2], keys=[0, 1, 0, 1, 1, 0, 0]))
        assert torch.equal(joined.expert_bias, whole.expert_bias)
        assert joined.expert_bias.any()
    assert join_routings([(one, None)]) == (one, None)
    assert join_routings([(None,), (None,)]) == (None,)


def test_groups_keep_a_bias_each_and_a_joined_step_finds_it():
    torch.manual_seed(0)
    inner = TopKRouter.Config(top_k=1, expert_bias="key", expert_bias_rate=0.1)
    config = ByModalityRouter.Config(experts=(2, 3), router=inner)
    routers = [config.build(hidden_size=6, num_experts=5, num_modalities=2) for _ in range(2)]
    routers[1].load_state_dict(routers[0].state_dict())
    rows, x = rows_of(sort=True), torch.randn(2, 12, 6)
    steps = [(routers[0](part, rows),) for part in x]
    routers[0].update(join_routings(steps)[0])
    wide = rows_of(torch.cat((KEYS, KEYS)), sort=True)
    timed = torch.cat([rows.to_time(part) for part in x])
    routers[1].update(routers[1](wide.to_rows(timed), wide))
    for one, other in zip(routers[0].routers, routers[1].routers, strict=True):
        assert torch.equal(one.expert_bias, other.expert_bias)
    assert routers[0].routers[1].expert_bias[1].any()


def test_the_bias_stays_in_float32_whatever_the_model_is_cast_to():
    router = make(expert_bias="shared").to(torch.bfloat16)
    assert router.expert_bias.dtype == torch.float32
    assert router.scorer.weight.dtype == torch.bfloat16


@pytest.mark.parametrize("by_key", [True, False])
@pytest.mark.parametrize("scope", ["batch", "sequence"])
def test_balance_is_asked_for_inside_of_groups(by_key, scope):
    router = make(load_balance_coef=1.0, load_balance_scope=scope, load_balance_by_key=by_key)
    rows, x = rows_of(sort=True), torch.randn(12, 6)
    routing = router(x, rows)
    probs, ids = routing.router_logits.softmax(-1), routing.expert_ids.view(12, 2)
    sequences = rows.time_index // 6
    names = [(int(s) if scope == "sequence" else 0, int(k) if by_key else 0)
             for s, k in zip(sequences, rows.key_ids, strict=True)]  # fmt: skip
    wanted = 0.0
    for name in set(names):
        own = [row for row, held in enumerate(names) if held == name]
        wanted = wanted + load_balance_loss(probs[own], ids[own].flatten(), 2) * len(own) / 12
    torch.testing.assert_close(routing.losses["load_balance"], wanted)


def test_balance_inside_groups_is_one_where_each_is_balanced_and_more_where_only_the_batch_is():
    probs = torch.eye(2).repeat_interleave(4, 0)  # key 0 takes expert 0 alone, key 1 expert 1
    ids, keys = probs.argmax(-1), torch.tensor([0] * 4 + [1] * 4)
    assert load_balance_loss(probs, ids).item() == 1
    assert load_balance_loss(probs, ids, groups=keys, num_groups=2).item() == 2
    even = torch.tensor([0, 1] * 4)
    assert load_balance_loss(torch.full((8, 2), 0.5), even, groups=keys, num_groups=2).item() == 1


@pytest.mark.parametrize(("form", "wanted"), [("choices", 1.0), ("choices_per_token", 3.0), ("first_choice", 1.0)])
def test_each_form_at_uniform_routing(form, wanted):
    ids = torch.stack([(torch.arange(12) + step) % 4 for step in range(3)], 1).flatten()
    assert load_balance_loss(torch.full((12, 4), 0.25), ids, 3, form=form).item() == pytest.approx(wanted)


def test_the_first_choice_alone_counts_in_its_form():
    probs, ids = torch.randn(6, 3).softmax(-1), torch.tensor([[0, 1], [0, 2], [1, 0], [0, 1], [2, 0], [0, 1]])
    share = torch.tensor([4, 1, 1]) / 6
    found = load_balance_loss(probs, ids.flatten(), 2, form="first_choice")
    torch.testing.assert_close(found, 3 * (share * probs.mean(0)).sum())
    torch.testing.assert_close(found, 9 * (share * probs.mean(0)).mean())  # as GShard writes it


def test_importance_is_the_variation_of_what_experts_are_given():
    assert importance_loss(torch.full((5, 4), 0.25)).item() == 0
    assert importance_loss(torch.eye(4)[[1] * 5]).item() == pytest.approx(3)
    probs = torch.randn(7, 4).softmax(-1)
    amount = probs.sum(0)
    torch.testing.assert_close(importance_loss(probs), (amount.std(correction=0) / amount.mean()) ** 2)


def test_load_is_the_chance_of_being_chosen_again():
    torch.manual_seed(0)
    logits, noise = torch.randn(9, 4), 0.5
    noisy = logits + noise * torch.randn(9, 4)
    threshold = noisy.topk(2).values[:, 1:]
    chance = ((logits + noise * torch.randn(20000, 9, 4)) > threshold).float().mean(0)
    amount = chance.sum(0)
    wanted = (amount.std(correction=0) / amount.mean()) ** 2
    torch.testing.assert_close(load_loss(logits, noisy, 2, noise), wanted, atol=2e-3, rtol=0.05)
    assert load_loss(torch.zeros(4, 4), torch.eye(4), 1, 0.5).item() == pytest.approx(0, abs=1e-6)


def test_limoe_wants_sure_rows_and_several_experts_a_modality():
    keys = torch.tensor([0, 0, 0, 0, 1, 1])
    sure = torch.eye(4)[[0, 1, 2, 3, 0, 0]]
    local, overall = entropy_losses(sure, keys, 3, 4)
    assert local.item() == pytest.approx(0, abs=1e-6)
    assert overall.item() == pytest.approx(math.log(4) / 2)  # key 1 uses one expert, key 2 has no rows
    unsure = torch.full((6, 4), 0.25)
    local, overall = entropy_losses(unsure, keys, 3, 4)
    assert local.item() == pytest.approx(math.log(4))
    assert overall.item() == pytest.approx(0, abs=1e-6)
    _, few = entropy_losses(sure, keys, 3, 1)
    assert few.item() == 0


def test_orthogonality_is_zero_at_right_angles_and_one_between_copies_but_for_the_diagonal():
    assert orthogonality_loss(3 * torch.eye(4, 6)).item() == pytest.approx(0)
    assert orthogonality_loss(torch.ones(4, 6)).item() == pytest.approx(12 / 16)


def test_mutual_information_is_that_of_the_joint_distribution():
    keys = torch.tensor([0, 0, 1, 1])
    assert mutual_information(torch.eye(2)[keys], keys, 2).item() == pytest.approx(math.log(2))
    assert mutual_information(torch.full((4, 2), 0.5), keys, 2).item() == pytest.approx(0, abs=1e-6)
    probs = torch.randn(4, 3).softmax(-1)
    joint = torch.stack([probs[keys == key].sum(0) for key in range(2)]) / 4
    wanted = (joint * (joint / (joint.sum(0) * joint.sum(1, keepdim=True))).log()).sum()
    torch.testing.assert_close(mutual_information(probs, keys, 2), wanted)


ALL = {
    "load_balance_coef": 0.5, "z_loss_coef": 0.25, "importance_coef": 0.2, "load_coef": 0.3, "noise": 0.25,
    "local_entropy_coef": 0.1, "global_entropy_coef": 0.4, "orthogonality_coef": 0.6, "mutual_information_coef": 0.7,
}  # fmt: skip


def test_every_loss_reaches_the_router_and_carries_its_coefficient():
    router, rows, x = make(**ALL).eval(), rows_of(), torch.randn(12, 6)
    routing = router(x, rows)
    probs = routing.router_logits.softmax(-1)
    local, overall = entropy_losses(probs, rows.key_ids, 2, 4)
    wanted = {
        "importance": 0.2 * importance_loss(probs),
        "load": 0.3 * load_loss(routing.router_logits, routing.router_logits, 2, 0.25),
        "local_entropy": 0.1 * local,
        "global_entropy": 0.4 * overall,
        "orthogonality": 0.6 * orthogonality_loss(router.scorer.weight),
        "mutual_information": -0.7 * mutual_information(probs, rows.key_ids, 2),
    }
    assert set(routing.losses) == {*wanted, "load_balance", "router_z"}
    for name, value in wanted.items():
        torch.testing.assert_close(routing.losses[name], value)
        router.zero_grad()
        if name != "global_entropy":
            value.backward(retain_graph=True)
            assert router.scorer.weight.grad.any(), name


@pytest.mark.parametrize("count", [0, 5])
def test_rows_that_do_not_count_change_no_loss(count):
    router, x = make(**ALL).eval(), torch.randn(12, 6)
    whole = rows_of()
    counted = torch.zeros(12, dtype=torch.bool)
    counted[:count] = True
    marked = RowLayout(**{**vars(whole), "counted": counted})
    found = router(x, marked).losses
    alone = rows_of(KEYS.view(1, -1)[:, :count])
    for name, loss in router(x[:count], alone).losses.items():
        torch.testing.assert_close(found[name], loss, msg=name)
        assert loss.isfinite()


def test_entropies_of_chosen_keys_alone():
    one = make(local_entropy_coef=1.0, entropy_keys=(1,)).eval()
    rows, x = rows_of(), torch.randn(12, 6)
    routing = one(x, rows)
    own = rows.key_ids == 1
    wanted, _ = entropy_losses(routing.router_logits.softmax(-1)[own], rows.key_ids[own], 2, 4)
    torch.testing.assert_close(routing.losses["local_entropy"], wanted)


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"load_balance_form": "switch"}, "known: choices, choices_per_token, first_choice"),
        ({"load_balance_scope": "world"}, "known: batch, sequence, ranks"),
        ({"expert_bias": "expert"}, "known: none, shared, key"),
        ({"expert_bias_update": "adam"}, "known: sign, proportional"),
        ({"entropy_keys": (2,)}, "among the 2 keys"),
        ({"global_entropy_experts": 99.0}, "99.0 is more than the . experts that there are"),
        ({"load_coef": 0.1}, "set noise > 0"),
    ],
)
def test_what_does_not_fit_is_refused(fields, told):
    with pytest.raises(ConfigError, match=told):
        make(**fields)

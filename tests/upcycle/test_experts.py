"""Copies under a router: exact where the report says so, right on average where rescaled, and told otherwise."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from omnimoe import upcycle
from omnimoe.experts import RoutedExperts
from omnimoe.routers import (
    AttributeRouter,
    ByModalityRouter,
    ExpertChoiceRouter,
    ExpertThresholdRouter,
    HashRouter,
    StaticRouter,
    TopKRouter,
)
from tests.declarations import DENSE, build, ids_like, routed
from tests.upcycle.seeds import seed_of, text_of

TEXT_POST = seed_of("text_post")


def upcycled(seed, **asked):
    return upcycle(seed, batch=text_of(seed), return_report=True, **asked)


FRESH = {
    "top 2": (TopKRouter.Config(), "exact", "exact"),
    "top 3 of sigmoids": (TopKRouter.Config(top_k=3, score="sigmoid"), "exact", "exact"),
    "top 2 scaled": (TopKRouter.Config(routed_scaling_factor=2.5), "exact", "exact"),
    "top 4 of 4": (TopKRouter.Config(top_k=4, normalize=False), "exact", "exact"),
    "top 2 by shares": (TopKRouter.Config(top_k=3, top_p=0.6), "exact", "exact"),
    "top 1": (TopKRouter.Config(top_k=1), "rescaled", "exact"),
    "top 2 of sigmoids as they are": (TopKRouter.Config(score="sigmoid", normalize=False), "rescaled", "exact"),
    "attributes": (AttributeRouter.Config(), "exact", "exact"),
    "a table": (HashRouter.Config(num_ids=20, top_k=2, is_learned=False), "exact", "exact"),
    "static": (StaticRouter.Config(experts_of_keys=((0, 1, 2, 3),)), "exact", "exact"),
    "room": (TopKRouter.Config(capacity_factor=1.0), "changed", "changed"),
    "experts choose": (ExpertChoiceRouter.Config(), "changed", "changed"),
    "thresholds": (ExpertThresholdRouter.Config(), "changed", "changed"),
}


@pytest.mark.parametrize("placement", ["pre", "post"])
@pytest.mark.parametrize("name", FRESH)
def test_a_network_becomes_experts(name, placement):
    router, *told = FRESH[name]
    seed = seed_of("text" if placement == "pre" else "text_post")
    report = upcycled(seed, experts=4, router=router)[1]
    function = told[placement == "post"]
    assert {change.function for change in report.changes} == {function}
    assert [change.where for change in report.changes] == [f"model.backbone.layers.{i}.mlp" for i in range(2)]
    assert report.is_preserved == (function == "exact") == (not report.complaint)
    if function == "exact":
        # under a norm only the number that it adds is felt
        assert report.measured.difference < (2e-6 if placement == "pre" else 2e-3)
    elif placement == "pre":
        assert report.measured.difference > 1e-5


def test_moma_s_start_under_a_norm_is_exact_where_an_expert_takes_the_row():
    """With room for every row each expert takes all, and the norm divides the sum of their weights away."""
    router = ExpertChoiceRouter.Config(capacity_factor=4.0)
    assert upcycled(TEXT_POST, experts=4, router=router)[1].measured.difference < 2e-3
    assert upcycled(seed_of("text"), experts=4, router=router)[1].measured.difference > 0.01


def test_rescaling_is_right_on_average():
    """Scores of an untrained router lie around a half, so twice the network is what is wanted."""
    seed, router = seed_of("text"), TopKRouter.Config(top_k=1, score="sigmoid", normalize=False)
    model, report = upcycled(seed, experts=4, router=router)
    layer, old = model.model.backbone.layers[0].mlp, seed.model.backbone.layers[0].mlp
    assert torch.equal(layer.experts.down_proj, 2 * old.experts.down_proj.expand(4, -1, -1))
    assert torch.equal(layer.experts.gate_up_proj, old.experts.gate_up_proj.expand(4, -1, -1))
    plain = upcycled(seed, experts=4, router=router, rescale=False)[1]
    assert plain.changes[0].function == "changed"
    assert report.measured.difference < plain.measured.difference / 4


MORE = {
    "mixtral": 8,
    "olmoe": 16,
    "qwen2_moe": 12,
    "qwen3_moe": 12,
    "gpt_oss": 10,
}


@pytest.mark.parametrize("name", MORE)
def test_more_experts_of_a_sparse_seed_are_exact_when_a_row_meets_all_copies(name):
    seed = seed_of(name)
    model, report = upcycled(seed, experts=MORE[name], router_noise=0.0)
    assert report.is_preserved
    assert report.measured.difference < 2e-5
    before = next(block.experts for block in seed.config.blocks if isinstance(block.experts, RoutedExperts.Config))
    after = next(block.experts for block in model.config.blocks if isinstance(block.experts, RoutedExperts.Config))
    assert (after.num_experts, after.router.top_k) == (2 * before.num_experts, 2 * before.router.top_k)
    near = upcycled(seed, experts=MORE[name])[1]
    assert not near.is_preserved
    assert {change.function for change in near.changes} == {"rescaled"}
    # where two experts are nearly as good, a copy of the one may take the place of a copy of the other
    assert abs(near.measured.new_loss - near.measured.loss) < 0.01


@pytest.mark.parametrize("name", MORE)
def test_a_group_of_all_experts_for_each_modality_is_exact(name):
    seed = seed_of(name)
    _, report = upcycled(seed, modalities={"image": 12}, experts={"text": MORE[name] // 2, "image": MORE[name]})
    assert not report.is_preserved  # the groups differ in size, so one of them has copies and the other has not
    even = {"text": MORE[name] // 2, "image": MORE[name] // 2}
    report = upcycled(seed, modalities={"image": 12}, experts=even)[1]
    assert report.is_preserved
    assert report.measured.difference < 2e-5


def test_other_scores_over_copies():
    for router in (
        TopKRouter.Config(top_k=1),
        TopKRouter.Config(top_k=2, score="sigmoid", normalize=False),
        TopKRouter.Config(top_k=2, score="sqrt_softplus"),
        ExpertChoiceRouter.Config(capacity_factor=1.5),
        ExpertChoiceRouter.Config(score="softmax"),
    ):
        seed = build(DENSE.replace(modalities=DENSE.modalities[:1], experts=routed(4, router)))
        report = upcycled(seed, experts=8, router_noise=0.0)[1]
        assert report.is_preserved, router
        assert report.measured.difference < 5e-6, router


def test_a_router_that_gives_copies_of_one_expert_in_the_place_of_two_is_told():
    seed = seed_of("mixtral")
    router = next(block.experts.router for block in seed.config.blocks)
    report = upcycled(seed, experts=8, router=router)[1]
    assert {change.function for change in report.changes} == {"changed"}
    assert "copies of one expert" in report.complaint
    assert report.measured.difference > 0.01


def test_groups_of_experts_are_told():
    report = upcycled(seed_of("deepseek_v3"), experts=16, router_noise=0.0)[1]
    assert "groups of experts" in report.complaint


def test_groups_grow_key_by_key():
    """One expert a modality, then four under a router whose weights sum to one."""
    lone = DENSE.replace(experts=routed(3, ByModalityRouter.Config(experts=(1, 1, 1), router=TopKRouter.Config())))
    for placement in ("pre", "post"):
        seed = build(lone.replace(norm_placement=placement))
        model, report = upcycle(
            seed,
            experts={"text": 4, "image": 4, "speech": 2},
            batch=ids_like(lone),
            return_report=True,
        )
        assert report.is_preserved
        assert report.measured.difference < (2e-6 if placement == "pre" else 2e-3)
        bank, old = (held.model.backbone.layers[0].mlp.experts.down_proj for held in (model, seed))
        assert [int((old == copy).flatten(1).all(1).nonzero()) for copy in bank] == [0] * 4 + [1] * 4 + [2] * 2
    report = upcycle(seed, experts={"text": 4, "image": 1, "speech": 1}, return_report=True)[1]
    assert report.is_preserved


ONE_EACH, ALIKE = dict.fromkeys(("text", "image", "speech"), 1), {"towers": {"attention": "modality"}}


@pytest.mark.parametrize(
    ("experts", "inner", "asked"),
    [
        ((1, 1, 1), ExpertChoiceRouter.Config(), {"experts": ONE_EACH}),
        ((1, 1, 1), ExpertChoiceRouter.Config(), ALIKE),
        ((2, 2, 1), TopKRouter.Config(top_k=1, score="sigmoid"), {"experts": {"text": 2, "image": 2, "speech": 1}}),
        ((1, 1, 1), TopKRouter.Config(top_k=1, score="sigmoid"), {"experts": dict.fromkeys(ONE_EACH, 2)}),
    ],
)
def test_a_gate_on_a_lone_expert_goes_along(experts, inner, asked):
    router = ByModalityRouter.Config(experts=experts, router=inner, gate_lone_expert=True)
    seed = build(DENSE.replace(experts=routed(sum(experts), router)))
    batch = ids_like(DENSE)
    model, report = upcycle(seed, batch=batch, return_report=True, router_noise=0.0, **asked)
    assert model.config.experts.router.gate_lone_expert
    assert report.is_preserved
    with torch.no_grad():
        assert (model(batch).logits - seed(batch).logits).abs().max() < 5e-6
    # and where it is taken away, that is told
    plain = router.replace(gate_lone_expert=False)
    _, told = upcycle(seed, batch=batch, return_report=True, experts=seed.config.experts.replace(router=plain))
    assert not told.is_preserved
    assert told.measured.difference > 0.1


def test_groups_of_one_grow_under_the_router_that_they_declare():
    """MoMa's own way from 1t1i to 4t4i: the experts choose, and a token costs what it did."""
    inner = ExpertChoiceRouter.Config(causal_form="none", gumbel_noise=1.0)
    seed = build(DENSE.replace(experts=routed(3, ByModalityRouter.Config(experts=(1, 1, 1), router=inner))))
    model, report = upcycle(seed, return_report=True, experts=dict.fromkeys(ONE_EACH, 4))
    assert model.config.experts.router == ByModalityRouter.Config(experts=(4, 4, 4), router=inner)
    assert {change.function for change in report.changes} == {"changed"}
    assert model.config.experts.router.experts_per_token(12, 0) == 1.0


@pytest.mark.parametrize("placement", ["pre", "post"])
@pytest.mark.parametrize("inner", [ExpertChoiceRouter.Config(), TopKRouter.Config(top_k=1, capacity_factor=1.0)])
def test_a_group_of_their_own_changes_what_rows_compete_with(inner, placement):
    config = DENSE.replace(norm_placement=placement, experts=routed(4, inner))
    asked = {"experts": dict.fromkeys(ONE_EACH, 4), "router_noise": 0.0, "return_report": True}
    report = upcycle(build(config), batch=ids_like(DENSE), **asked)[1]
    assert {change.function for change in report.changes} == {"changed"}
    assert report.measured.difference > 0.1
    # where every row is routed by itself, or all rows are of one modality, a group of their own is no change
    alone = build(config.replace(experts=routed(4, TopKRouter.Config())))
    report = upcycle(alone, batch=ids_like(DENSE), **asked)[1]
    assert report.is_preserved
    assert report.measured.difference < 2e-6
    words = build(config.replace(modalities=DENSE.modalities[:1]))
    report = upcycle(words, batch=text_of(words), **asked | {"experts": {"text": 4}})[1]
    assert report.measured.difference < 2e-6


@pytest.mark.parametrize("placement", ["pre", "post"])
def test_noise_on_the_rows_of_a_router_is_never_exact(placement):
    seed = build(DENSE.replace(norm_placement=placement, experts=routed(4, TopKRouter.Config())))
    report = upcycle(seed, batch=ids_like(DENSE), return_report=True, experts=8)[1]
    assert {change.function for change in report.changes} == {"rescaled"}
    assert not report.is_preserved
    assert report.measured.difference > 1e-5


def test_copies_part_in_training():
    model = upcycle(seed_of("text"), experts=4)
    bank = model.model.backbone.layers[0].mlp.experts.down_proj
    optimizer, ids = torch.optim.AdamW(model.parameters(), lr=1e-2), text_of(model)
    for _ in range(2):
        model(ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    gaps = [float((bank[i] - bank[j]).abs().max()) for i in range(4) for j in range(i)]
    assert min(gaps) > 1e-4
    sparse = upcycle(seed_of("mixtral"), experts=8)
    router = sparse.model.backbone.layers[0].mlp.router.scorer.weight
    assert 0 < float((router[0] - router[1]).abs().max()) < 0.1


def test_noise_on_copies_sums_to_nothing_and_is_told():
    model, report = upcycled(seed_of("text"), experts=4, expert_noise=0.1)
    bank = model.model.backbone.layers[0].mlp.experts.gate_up_proj
    old = seed_of("text").model.backbone.layers[0].mlp.experts.gate_up_proj
    torch.testing.assert_close(bank.mean(0, keepdim=True), old, atol=1e-6, rtol=1e-5)
    assert not torch.equal(bank[0], bank[1])
    assert "moved apart by 0.1" in report.complaint


def test_networks_beside_the_copies_add_nothing_at_first():
    experts = routed(4, TopKRouter.Config(), num_shared_experts=1)
    model, report = upcycled(seed_of("text"), experts=experts)
    assert report.is_preserved
    assert report.measured.difference < 2e-6
    shared = model.model.backbone.layers[0].mlp.shared_experts
    ids = text_of(model)
    model(ids, labels=ids).loss.backward()
    assert shared.down_proj.grad.abs().max() > 0


def test_static_routes_and_free_experts():
    seed = seed_of("static")
    experts = dataclasses.replace(seed.config.experts, num_experts=4)
    experts = experts.replace(router=StaticRouter.Config(experts_of_keys=((0, 3), 1, 2)))
    report = upcycle(seed, experts=experts, batch=ids_like(seed.config), return_report=True)[1]
    assert report.is_preserved
    assert report.measured.difference < 2e-6
    odd = upcycled(seed_of("text"), experts=routed(4, TopKRouter.Config(), num_zero_experts=1))[1]
    assert "beside the copies" in odd.complaint


def test_a_selection_bias_and_an_auxiliary_router_go_along():
    router = TopKRouter.Config(expert_bias="shared", score="sigmoid")
    seed = build(DENSE.replace(modalities=DENSE.modalities[:1], experts=routed(4, router)))
    for layer in seed.model.backbone.layers:
        layer.mlp.router.expert_bias.copy_(torch.tensor([0.5, -0.5, 0.2, 0.0]))
    model, report = upcycled(seed, experts=8, router_noise=0.0)
    assert report.measured.difference < 2e-6
    assert torch.equal(
        model.model.backbone.layers[0].mlp.router.expert_bias, torch.tensor([0.5, 0.5, -0.5, -0.5, 0.2, 0.2, 0, 0])
    )
    choice = ExpertChoiceRouter.Config(causal_form="auxiliary")
    seed = build(DENSE.replace(modalities=DENSE.modalities[:1], experts=routed(4, choice)))
    report = upcycled(seed, experts=8, router_noise=0.0)[1]
    assert report.measured.difference < 2e-6
    ids = text_of(seed)
    model = upcycle(seed, experts=8, router_noise=0.0)
    with torch.no_grad():
        wanted, found = (held(ids, use_cache=True).logits for held in (seed, model))
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)

"""MoMa's second stage: auxiliary routers are added, trained alone and measured; until then nothing is generated."""

from __future__ import annotations

import pytest
import torch

import omnimoe
from omnimoe import LayerRange, OmniMoeForCausalLM, keep_frozen, unfreeze
from omnimoe.config import ConfigError
from omnimoe.experts import RoutedAttention
from omnimoe.inputs import InputError
from omnimoe.routers import ByModalityRouter, DepthRouter, ExpertChoiceRouter, SoftRouter, TopKRouter
from tests.declarations import DECLARATIONS, DENSE, build, ids_like, routed

CHOICE = ExpertChoiceRouter.Config(causal_form="none", gumbel_noise=1.0)
DEPTH = (LayerRange(step=2, depth=DepthRouter.Config(capacity=0.5, pool="batch")),)
FIRST_STAGE = {
    "moma": DENSE.replace(experts=routed(6, ByModalityRouter.Config(experts=(2, 3, 1), router=CHOICE))),
    "moma, cut-off": DECLARATIONS["moma"],
    "choice": DECLARATIONS["expert_choice"],
    "moma, tied, by depth": DENSE.replace(
        experts=routed(6, ByModalityRouter.Config(experts=(2, 3, 1), router=CHOICE)),
        layers=DEPTH,
        tie_word_embeddings=True,
    ),
    "dense by depth": DENSE.replace(layers=DEPTH),
    "in attention, by depth": DENSE.replace(
        attention=RoutedAttention.Config(
            num_heads=4, num_kv_heads=2, num_experts=6, router=ByModalityRouter.Config(experts=(2, 3, 1), router=CHOICE)
        ),
        layers=DEPTH,
    ),
    "in some layers": DENSE.replace(
        experts=routed(4, TopKRouter.Config(expert_bias="shared")),
        layers=(LayerRange(start=1, experts=routed(4, CHOICE)),),
    ),
}


def prepared(name: str) -> OmniMoeForCausalLM:
    model = build(FIRST_STAGE[name])
    ids = ids_like(DENSE)
    model.train().update_routers(model(ids).routings)  # cut-offs and biases that are not where they start
    return model.eval()


def state(model) -> dict[str, torch.Tensor]:
    return {name: held.clone() for name, held in model.state_dict().items()}


@pytest.mark.parametrize("name", FIRST_STAGE)
def test_they_are_added_beside_the_same_weights_and_change_nothing_without_a_cache(name):
    model, ids = prepared(name), ids_like(DENSE)
    before, wanted, config = state(model), model(ids).logits, model.config.to_dict()
    grown = omnimoe.add_auxiliary_routers(model)
    assert not grown.training
    assert torch.equal(grown(ids).logits, wanted)
    assert model.config.to_dict() == config
    own = state(grown)
    assert {held for held in own if held not in before} == {held for held in own if ".auxiliary." in held} != set()
    assert all(torch.equal(own[held], before[held]) for held in before)
    assert all(block.has_causal_form for block in grown.config.blocks)
    again = omnimoe.add_auxiliary_routers(grown)
    assert again.config.blocks == grown.config.blocks
    assert {*state(again)} == {*own}


@pytest.mark.parametrize("name", FIRST_STAGE)
def test_all_else_stays_to_the_bit_and_then_it_generates(name, tmp_path):
    grown, ids = omnimoe.add_auxiliary_routers(prepared(name)), ids_like(DENSE)
    with pytest.raises(InputError, match=r"of layers [\d, ]+ were never trained.*--stage auxiliary"):
        grown.generate(ids[:, :4], max_new_tokens=2)
    held = omnimoe.hold_all_but_auxiliary(grown)
    assert held.trained == sum(weight.numel() for key, weight in grown.named_parameters() if ".auxiliary." in key)
    assert held.kept + held.trained == sum(weight.numel() for weight in grown.parameters())
    before, losses = state(grown), []
    optimizer = keep_frozen(torch.optim.AdamW(grown.parameters(), lr=0.02, weight_decay=0.5))
    for seed in range(30):
        out = grown(ids_like(DENSE, 4, seed=seed), labels=ids_like(DENSE, 4, seed=seed))
        out.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        grown.update_routers(out.routings)
        losses.append(out.aux_loss.item())
    assert sum(losses[-5:]) < sum(losses[:5])
    after = state(grown)
    moved = [key for key in after if not torch.equal(after[key], before[key])]
    assert {*moved} == {key for key in after if ".auxiliary." in key}
    assert grown.generate(ids[:, :4], max_new_tokens=2, do_sample=False).shape == (2, 6)
    grown.save_pretrained(tmp_path)
    again = omnimoe.from_pretrained(tmp_path)
    assert again.generate(ids[:, :4], max_new_tokens=2, do_sample=False).shape == (2, 6)
    unfreeze(grown)
    out = grown(ids, labels=ids)
    out.loss.backward()
    assert all(weight.grad is not None for weight in grown.parameters())
    grown.update_routers(out.routings)
    if before.keys() != {key for key in before if not key.endswith(("cutoff", "expert_bias"))}:
        assert any(not torch.equal(after[key], held) for key, held in state(grown).items() if ".auxiliary." not in key)


@pytest.mark.parametrize("name", ["moma", "moma, tied, by depth"])
def test_what_is_measured_is_what_a_loop_counts(name):
    grown = omnimoe.add_auxiliary_routers(prepared(name))
    with torch.no_grad():
        for key, weight in grown.named_parameters():
            if ".auxiliary.outer" in key:
                weight.normal_(std=2.0, generator=torch.Generator().manual_seed(1))
    batches = [{"input_ids": ids_like(DENSE, seed=seed)} for seed in range(3)]
    routers = {
        key: module for key, module in grown.named_modules() if isinstance(module, ExpertChoiceRouter | DepthRouter)
    }
    seen: dict[str, list] = {key: [] for key in routers}
    handles = [
        module.register_forward_hook(lambda module, given, out, key=key: seen[key].append((given, out)))
        for key, module in routers.items()
    ]
    found = omnimoe.measure_auxiliary_routers(grown.train(), batches)
    for handle in handles:
        handle.remove()
    assert grown.training
    assert len(found) == len(seen)
    for one, (key, calls) in zip(found, seen.items(), strict=True):
        module, pairs = grown.get_submodule(key), []
        for (x, _), out in calls:
            for row in range(len(x)):
                for choice in range(module.auxiliary.outer.weight.shape[0]):
                    said = bool(module.auxiliary(x[row : row + 1])[0, choice] > 0)
                    if one.kind == "depth":
                        did = row in out[0].tolist()
                    else:
                        did = (row, choice) in zip(out.token_index.tolist(), out.expert_ids.tolist(), strict=True)
                    pairs.append((said, did))
        assert one.accuracy == pytest.approx(sum(said == did for said, did in pairs) / len(pairs))
        both = sum(said and did for said, did in pairs)
        assert one.precision == pytest.approx(both / max(1, sum(said for said, _ in pairs)))
        assert one.recall == pytest.approx(both / sum(did for _, did in pairs))
        assert key.startswith(f"model.backbone.layers.{one.layer}.")
        assert f"layer {one.layer}, {one.kind}" in str(one)
    assert {one.key for one in found if one.kind == "experts"} <= {"text", "image", "speech"}


@pytest.mark.parametrize("name", ["moma", "moma, tied, by depth"])
def test_with_thresholds_set_each_takes_as_many_rows_as_its_main_router(name):
    grown = omnimoe.add_auxiliary_routers(prepared(name))
    with torch.no_grad():
        for key, weight in grown.named_parameters():
            if ".auxiliary.outer" in key:
                weight.normal_(generator=torch.Generator().manual_seed(1))
    batches = [{"input_ids": ids_like(DENSE, 4, seed=seed)} for seed in range(4)]
    before, held = omnimoe.measure_auxiliary_routers(grown, batches), state(grown)
    assert any(one.taken != pytest.approx(one.wanted, rel=0.1) for one in before)
    omnimoe.set_auxiliary_thresholds(grown.train(), batches)
    assert grown.training
    for one in omnimoe.measure_auxiliary_routers(grown, batches):
        equal_rows = one.layer == 0  # which no threshold can part
        assert one.taken == pytest.approx(one.wanted, abs=0.15 if equal_rows else 0.02), str(one)
    own = state(grown)
    assert {key for key in own if not torch.equal(own[key], held[key])} <= {
        key for key in own if key.endswith(".auxiliary.outer.bias")
    }


def test_who_foretells_everything_is_right_everywhere():
    grown = omnimoe.add_auxiliary_routers(prepared("dense by depth"))
    depth = grown.model.backbone.layers[0].depth
    whole = depth.forward  # the choice itself, past the hook that measures
    depth.auxiliary.takes = lambda x: torch.zeros(len(x), 1, dtype=torch.bool).index_fill(0, whole(x, None)[0], True)
    (found,) = omnimoe.measure_auxiliary_routers(grown, [{"input_ids": ids_like(DENSE)}])
    assert (found.accuracy, found.precision, found.recall, found.exact) == (1, 1, 1, 1)
    assert found.taken == found.wanted == 0.5


@pytest.mark.parametrize(
    ("config", "told"),
    [
        (DENSE, "needs no auxiliary ones"),
        (DECLARATIONS["moe"], "needs no auxiliary ones"),
        (
            DENSE.replace(experts=routed(2, SoftRouter.Config())),
            "no form that routes a token by",
        ),
    ],
    ids=["dense", "token choice", "soft"],
)
def test_who_has_no_use_for_them_is_told(config, told):
    with pytest.raises(ConfigError, match=told):
        omnimoe.add_auxiliary_routers(build(config))


def test_a_model_without_them_is_left_as_it_was():
    model = build(DECLARATIONS["moma"])
    with pytest.raises(ConfigError, match="add_auxiliary_routers"):
        omnimoe.hold_all_but_auxiliary(model)
    assert all(weight.requires_grad for weight in model.parameters())


def test_experts_that_choose_generate_with_a_cache_alone():
    """Without one, the choice would be that of the whole prompt."""
    model, ids = build(DECLARATIONS["moma"]), ids_like(DENSE)[:, :4]
    with pytest.raises(InputError, match="drop use_cache=False"):
        model.generate(ids, max_new_tokens=1, use_cache=False)


def test_a_modality_that_was_never_seen_is_not_taken_for_trained():
    grown = omnimoe.add_auxiliary_routers(prepared("moma"))
    omnimoe.hold_all_but_auxiliary(grown)
    optimizer = torch.optim.AdamW(grown.parameters(), lr=0.02)
    ids = torch.randint(8, 20, (2, 8))  # text alone
    for _ in range(2):
        grown(ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    with pytest.raises(InputError, match="layers 0, 1 were never trained"):
        grown.generate(ids, max_new_tokens=1)

"""What transformers offers for any model, asked of ours: each choice is honoured, and one that cannot be is refused."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from omnimoe.experts_interface import experts_function
from omnimoe.inputs import InputError
from omnimoe.model import Layer, OmniMoeForCausalLM
from omnimoe.registry import RegistryError
from omnimoe.routers import Router
from tests.declarations import DECLARATIONS, DENSE, build, ids_like

CLOSE = {"atol": 2e-5, "rtol": 1e-4}
ROUTED = ("moe", "moe_sigmoid", "static", "moma_top_k", "expert_choice", "mot_hybrid")


class Elsewhere(OmniMoeForCausalLM):
    """A class in a file that holds neither experts nor attention."""


# -- experts ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["eager", "grouped_mm", "batched_mm"])
@pytest.mark.parametrize("declared", ROUTED)
def test_every_implementation_of_experts_gives_what_ours_does(declared, name):
    config = DECLARATIONS[declared]
    model, ids = build(config).train(), ids_like(config)
    mask = torch.ones_like(ids)
    mask[0, -3:] = 0
    assert model.config._experts_implementation == "omnimoe"
    found = []
    for implementation in ("omnimoe", name):
        model.set_experts_implementation(implementation)
        assert model.config._experts_implementation == implementation
        assert model.model.config._experts_implementation == implementation
        model.zero_grad()
        out = model(ids, attention_mask=mask, labels=ids)
        out.loss.backward()
        grads = {key: held.grad.clone() for key, held in model.named_parameters() if held.grad is not None}
        found.append((out.logits.detach(), grads))
    torch.testing.assert_close(found[1], found[0], **CLOSE)


@pytest.mark.parametrize("kind", [OmniMoeForCausalLM, Elsewhere])
def test_the_choice_of_experts_reaches_the_kernel_wherever_the_class_stands(kind, tmp_path):
    build(DECLARATIONS["moe"]).save_pretrained(tmp_path)
    calls = []

    def counted(self, *given):
        calls.append(self)
        return ALL_EXPERTS_FUNCTIONS["batched_mm"](self, *given)

    ALL_EXPERTS_FUNCTIONS.register("counted", counted)
    try:
        model = kind.from_pretrained(tmp_path, experts_implementation="counted")
        assert model.config._experts_implementation == "counted"
        ids = ids_like(DENSE)
        model(ids)
        assert len(calls) == 2
        assert (calls[0].num_experts, calls[0].has_gate, calls[0].has_bias) == (4, True, False)
        model.set_experts_implementation("omnimoe")
        model(ids)
        assert len(calls) == 2
        assert kind.from_pretrained(tmp_path).config._experts_implementation == "omnimoe"
    finally:
        ALL_EXPERTS_FUNCTIONS._global_mapping.pop("counted")


def test_an_unknown_implementation_of_experts_is_refused_and_the_old_one_stays():
    model = build(DECLARATIONS["moe"])
    with pytest.raises(RegistryError, match='experts_implementation="quick".*not supported; there are batched_mm'):
        model.set_experts_implementation("quick")
    assert model.config._experts_implementation == "omnimoe"
    with pytest.raises(RegistryError, match='experts_implementation="quick".*not supported'):
        experts_function("quick")


def test_what_is_asked_for_at_loading_is_no_fault_of_the_file(tmp_path):
    build(DECLARATIONS["moe"]).save_pretrained(tmp_path)
    with pytest.raises(RegistryError, match='experts_implementation="quick".*not supported'):
        AutoModelForCausalLM.from_pretrained(tmp_path, experts_implementation="quick")


def test_every_listed_implementation_of_experts_finds_what_it_reads():
    model, ids = build(DECLARATIONS["moe"]), ids_like(DECLARATIONS["moe"])
    for name in ALL_EXPERTS_FUNCTIONS:
        model.set_experts_implementation(name)
        try:
            model(ids)
        except (ImportError, RuntimeError, ValueError, NotImplementedError):
            if name in ("grouped_mm", "batched_mm", "omnimoe"):  # the others want a package or a device
                raise


def test_experts_without_a_gate_compute_in_every_way():
    config = DENSE.replace(experts=DECLARATIONS["moe"].experts.replace(gated=False, activation="gelu"))
    model, ids = build(config), ids_like(config)
    wanted = model(ids).logits
    for name in ("eager", "grouped_mm", "batched_mm"):
        model.set_experts_implementation(name)
        torch.testing.assert_close(model(ids).logits, wanted, **CLOSE)


# -- attention --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [OmniMoeForCausalLM, Elsewhere])
def test_the_choice_of_attention_is_honoured_and_visible_where_transformers_looks(kind, tmp_path):
    build(DENSE).save_pretrained(tmp_path)
    model, ids = kind.from_pretrained(tmp_path), ids_like(DENSE)
    calls = []

    def counted(module, query, key, value, attention_mask, **given):
        calls.append(module.config._attn_implementation)
        return ALL_ATTENTION_FUNCTIONS["sdpa"](module, query, key, value, attention_mask, **given)

    ALL_ATTENTION_FUNCTIONS.register("counted", counted)
    try:
        wanted = model(ids).logits
        for name in ("eager", "sdpa", "counted"):
            model.set_attn_implementation(name)
            assert model.config._attn_implementation == name
            assert {layer.self_attn.config._attn_implementation for layer in model.model.backbone.layers} == {name}
            torch.testing.assert_close(model(ids).logits, wanted, **CLOSE)
        assert calls == ["counted"] * 2
        with pytest.raises(RegistryError, match='implementation="quick"` is not supported; there are eager, counted'):
            model.set_attn_implementation("quick")
        assert model.config._attn_implementation == "counted"
    finally:
        ALL_ATTENTION_FUNCTIONS._global_mapping.pop("counted")


def test_attention_weights_are_given_where_they_are_asked_for_and_refused_where_there_are_none():
    model, ids = build(DENSE), ids_like(DENSE)
    assert model.config._attn_implementation == "sdpa"
    plain, asked = model(ids), model(ids, output_attentions=True)
    assert plain.attentions is None
    assert [tuple(part.shape) for part in asked.attentions] == [(2, 4, 12, 12)] * 2
    torch.testing.assert_close(asked.attentions[0].sum(-1), torch.ones(2, 4, 12))
    torch.testing.assert_close(asked.logits, plain.logits, **CLOSE)
    model.config._attn_implementation = "eager"
    model.config.output_attentions = True
    torch.testing.assert_close(model(ids).attentions, asked.attentions)
    assert model(ids, output_attentions=False).attentions is None

    def silent(module, query, key, value, attention_mask, **given):
        return ALL_ATTENTION_FUNCTIONS["sdpa"](module, query, key, value, attention_mask, **given)[0], None

    ALL_ATTENTION_FUNCTIONS.register("silent", silent)
    try:
        model.set_attn_implementation("silent")
        with pytest.raises(InputError, match="'silent' gives no weights; call set_attn_implementation\\('eager'\\)"):
            model(ids, output_attentions=True)
    finally:
        ALL_ATTENTION_FUNCTIONS._global_mapping.pop("silent")


# -- outputs ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["dense", "mot", "moe"])
def test_hidden_states_are_those_that_were_asked_for(name):
    config = DECLARATIONS[name]
    model, ids = build(config), ids_like(config)
    mask = torch.ones_like(ids)
    mask[1, :4] = 0
    whole = model(ids, attention_mask=mask, output_hidden_states=True).hidden_states
    assert len(whole) == config.num_layers + 1
    for asked, kept in ((0, {0}), (-1, {2}), ([0, 2], {0, 2}), ((1, -3), {0, 1}), ([7], set())):
        found = model(ids, attention_mask=mask, output_hidden_states=asked).hidden_states
        if not kept:
            assert found is None
            continue
        assert [index for index, part in enumerate(found) if part is not None] == sorted(kept)
        assert all(torch.equal(found[index], whole[index]) for index in kept)
    assert model(ids, output_hidden_states=False).hidden_states is None
    model.config.output_hidden_states = True
    assert torch.equal(model(ids, attention_mask=mask).hidden_states[1], whole[1])


def test_a_hidden_state_gets_the_gradient_of_what_comes_after_it():
    config = DECLARATIONS["mot"]
    model, ids = build(config), ids_like(config)
    out = model(ids, labels=ids, output_hidden_states=True)
    for part in out.hidden_states:
        part.retain_grad()
    out.loss.backward()
    assert all(part.grad is not None and part.grad.any() for part in out.hidden_states)


@pytest.mark.parametrize("name", ["moe", "moe_sigmoid", "moma_top_k"])
def test_router_logits_are_raw_and_the_config_or_the_call_asks_for_them(name):
    config = DECLARATIONS[name]
    model, ids = build(config), ids_like(config)
    assert model(ids).router_logits is None
    found = model(ids, output_router_logits=True).router_logits
    assert len(found) == config.num_layers
    assert {(len(part), part.dtype) for part in found} == {(ids.numel(), torch.float32)}
    reached = found[0][found[0].isfinite()]
    # neither probabilities nor their logarithms
    assert reached.min() < 0 < reached.max()
    assert not torch.allclose(found[0].exp().sum(-1), torch.ones(len(found[0])), atol=1e-3)
    below = model.model(ids, output_router_logits=True).router_logits
    assert all(torch.equal(one, two) for one, two in zip(found, below, strict=True))
    model.config.output_router_logits = True
    assert torch.equal(model(ids).router_logits[0], found[0])
    assert model(ids, output_router_logits=False).router_logits is None


def test_a_plain_tuple_on_request():
    model, ids = build(DENSE), ids_like(DENSE)
    out = model(ids, labels=ids)
    found = model(ids, labels=ids, return_dict=False)
    assert isinstance(found, tuple)
    assert torch.equal(found[0], out.loss)
    assert torch.equal(found[1], out.logits)
    assert torch.equal(model.model(ids, return_dict=False)[0], model.model(ids).last_hidden_state)


def test_what_can_be_recorded_is_said_and_every_layer_can_be_recomputed():
    model = build(DECLARATIONS["moe"])
    assert set(model._can_record_outputs) == {"hidden_states", "attentions", "router_logits"}
    assert any(isinstance(module, Router) for module in model.modules())
    assert all(isinstance(layer, GradientCheckpointingLayer) for layer in model.model.backbone.layers)
    assert model.is_backend_compatible()
    # a serving engine knows a bank of experts by its name and its three axes
    experts = model.model.backbone.layers[0].mlp.experts
    assert {name: parameter.ndim for name, parameter in experts.named_parameters()} == {
        "gate_up_proj": 3,
        "down_proj": 3,
    }


# -- losses as trainers ask for them ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["dense", "moe"])
def test_shifted_labels_give_the_loss_that_labels_do(name):
    config = DECLARATIONS[name]
    model, ids = build(config), ids_like(config)
    mask = torch.ones_like(ids)
    mask[0, -2:] = 0
    wanted = model(ids, attention_mask=mask, labels=ids)
    shifted = torch.nn.functional.pad(ids, (0, 1), value=-100)[:, 1:]
    shifted = shifted.masked_fill(~torch.nn.functional.pad(mask, (0, 1))[:, 1:].bool(), -100)
    found = model(ids, attention_mask=mask, shift_labels=shifted)
    torch.testing.assert_close(found.loss, wanted.loss)
    torch.testing.assert_close(found.losses, wanted.losses)
    torch.testing.assert_close(found.token_losses[:, :-1], wanted.token_losses[:, 1:])
    # they are in the place of labels, not beside them
    torch.testing.assert_close(model(ids, attention_mask=mask, labels=ids * 0, shift_labels=shifted).loss, wanted.loss)
    # a part of the sequence that was cut after the shift predicts its last token too
    part = model(ids, shift_labels=shifted).token_losses
    assert (part[1, :-1] > 0).all()
    with pytest.raises(InputError, match="shift_labels must be \\(2, 12\\), as the logits, got \\(2, 11\\)"):
        model(ids, shift_labels=shifted[:, 1:])


@pytest.mark.parametrize("name", ["dense", "moe"])
def test_losses_of_micro_batches_add_up_to_the_mean_over_their_tokens(name):
    config = DECLARATIONS[name]
    model, ids = build(config), ids_like(config, 4, 12)
    labels = ids.clone()
    labels[0, 3:] = -100
    parts = [(ids[:1], labels[:1]), (ids[1:], labels[1:])]
    alone = [model(part, labels=named) for part, named in parts]
    counts = [sum(out.counts.values()) for out in alone]
    assert [int(count) for count in counts] == [2, 33]
    wanted = sum(out.loss * count for out, count in zip(alone, counts, strict=True)) / 35
    found = sum(model(part, labels=named, num_items_in_batch=torch.tensor(35)).loss for part, named in parts)
    torch.testing.assert_close(found, wanted)
    if name == "dense":
        torch.testing.assert_close(found, model(ids, labels=labels).loss)


def test_the_trainer_steps_alike_in_one_batch_and_in_accumulated_ones(tmp_path):
    pytest.importorskip("accelerate")
    from transformers import Trainer, TrainingArguments

    ids = ids_like(DENSE, 4, 12)
    data = [
        {"input_ids": row, "labels": row.masked_fill(torch.arange(12) > stop, -100)}
        for row, stop in zip(ids, (3, 11, 6, 9), strict=True)
    ]
    stepped = []
    for size in (4, 1):
        model = build(DENSE)
        settings = TrainingArguments(
            output_dir=str(tmp_path / str(size)),
            per_device_train_batch_size=size,
            gradient_accumulation_steps=4 // size,
            max_steps=1,
            learning_rate=0.1,
            optim="sgd",
            max_grad_norm=0.0,
            lr_scheduler_type="constant",
            save_strategy="no",
            report_to=[],
            use_cpu=True,
            disable_tqdm=True,
        )
        Trainer(model=model, args=settings, train_dataset=data).train()
        stepped.append(model.state_dict())
    before = build(DENSE).state_dict()
    assert not torch.allclose(stepped[0]["lm_head.weight"], before["lm_head.weight"], atol=1e-4)
    torch.testing.assert_close(stepped[1], stepped[0], atol=1e-6, rtol=1e-4)


# -- placing ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    build(DECLARATIONS["moe"]).save_pretrained(folder)
    return folder


def places(model: PreTrainedModel) -> dict[str, str]:
    return {name: parameter.device.type for name, parameter in model.named_parameters()}


def test_layers_on_disk_compute_what_layers_in_memory_do(saved, tmp_path):
    pytest.importorskip("accelerate")
    ids = ids_like(DENSE)
    wanted = AutoModelForCausalLM.from_pretrained(saved)(ids).logits
    device_map = {
        "model.embed_tokens": "cpu",
        "model.backbone.layers.0": "disk",
        "model.backbone.layers.1": "cpu",
        "model.norm": "cpu",
        "lm_head": "disk",
    }
    model = AutoModelForCausalLM.from_pretrained(saved, device_map=device_map, offload_folder=tmp_path)
    assert model.hf_device_map["lm_head"] == "disk"
    where = places(model)
    on_disk = {name for name, place in where.items() if place == "meta"}
    assert on_disk == {name for name in where if name.startswith(("model.backbone.layers.0.", "lm_head"))}
    torch.testing.assert_close(model(ids).logits, wanted)
    found = model.generate(ids[:, :4], max_new_tokens=3, do_sample=False)
    assert torch.equal(
        found, AutoModelForCausalLM.from_pretrained(saved).generate(ids[:, :4], max_new_tokens=3, do_sample=False)
    )


def test_what_does_not_fit_goes_to_disk_and_no_layer_is_cut(saved, tmp_path):
    pytest.importorskip("accelerate")
    size = sum(held.numel() * 4 for held in AutoModelForCausalLM.from_pretrained(saved).parameters())
    model = AutoModelForCausalLM.from_pretrained(
        saved, device_map="auto", max_memory={"cpu": size // 2}, offload_folder=tmp_path
    )
    placed = model.hf_device_map
    assert set(placed.values()) == {"cpu", "disk"}
    assert not any("layers." in name and len(name.split(".")) > 4 for name in placed), "a layer was cut in two"
    ids = ids_like(DENSE)
    torch.testing.assert_close(model(ids).logits, AutoModelForCausalLM.from_pretrained(saved)(ids).logits)


@pytest.mark.parametrize("device_map", ["auto", "cpu", {"": "cpu"}])
def test_a_map_of_one_device_places_all_of_the_model(saved, device_map):
    pytest.importorskip("accelerate")
    model = AutoModelForCausalLM.from_pretrained(saved, device_map=device_map)
    assert set(places(model).values()) == {"cpu"}


def test_a_layer_is_what_must_not_be_cut():
    model = build(DENSE)
    assert model._no_split_modules == {"Layer"}
    assert {type(layer) for layer in model.model.backbone.layers} == {Layer}


def test_a_copy_of_a_model_has_a_config_of_its_own():
    model = build(DENSE)
    other = copy.deepcopy(model)
    other.set_attn_implementation("eager")
    assert model.config._attn_implementation == "sdpa"
    assert {layer.self_attn.config._attn_implementation for layer in other.model.backbone.layers} == {"eager"}

"""LoRA through PEFT itself: where it goes, that it is saved, reloaded and merged, and that it keeps to its towers."""

from __future__ import annotations

import sys

import pytest
import torch
from transformers import AutoModelForCausalLM

from omnimoe import Modality, add_lora, confine_lora, from_pretrained, lora_targets, quantize, register_modality
from omnimoe.layers.norm import BankHeadLayerNorm
from omnimoe.modalities import MODALITIES
from tests.declarations import CACHED, DECLARATIONS, TEXT, build, ids_like

peft = pytest.importorskip("peft")

KINDS = ["dense", "mot_post", "chameleon", "merged", "moe", "moma", "static", "expert_choice", "mot_hybrid"]
KINDS += ["attention_experts", "attention_heads"]
TOWERS = ["mot_post", "merged", "static", "moma", "mot_hybrid", "attention_experts", "attention_heads"]


def adapted(model, **options):
    torch.manual_seed(1)
    config = peft.LoraConfig(**lora_targets(model, sites=options.pop("sites", None)), r=2, **options)
    return peft.get_peft_model(model, config)


@pytest.fixture
def colours():
    """A modality whose projections are plain linear layers."""

    @register_modality("colours_of_a_test")
    class Colours(Modality):
        def __init__(self, config, *, hidden_size):
            super().__init__()
            self.enter, self.leave = torch.nn.Linear(3, hidden_size), torch.nn.Linear(hidden_size, 3)

        def embed(self, inputs, timesteps=None):
            return self.enter(inputs)

        def head(self, x):
            return self.leave(x)

    yield Colours
    MODALITIES.remove("colours_of_a_test")


def weights(model):
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def train(model, ids, steps=3):
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=0.05, weight_decay=0.1)
    for _ in range(steps):
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("name", DECLARATIONS)
def test_it_goes_on_every_bank_of_attention_and_experts(name):
    model = build(DECLARATIONS[name])
    norms = {f"{place}.weight" for place, part in model.named_modules() if isinstance(part, BankHeadLayerNorm)}
    norms |= {place.replace("weight", "bias") for place in norms}
    banks = {place for place, value in model.named_parameters() if value.ndim == 3} - norms
    targets = lora_targets(model)
    assert targets.pop("target_modules") == []
    assert set(targets.pop("target_parameters")) == banks
    assert targets == {}


@pytest.mark.parametrize(
    ("name", "sites", "fragments", "modules"),
    [
        ("mot_post", ["q_proj", "o_proj"], {"q_proj.weight", "o_proj.weight"}, set()),
        ("moe", ["experts"], {"gate_up_proj", "down_proj"}, set()),
        ("moe", ["shared_experts"], {"shared_experts.gate_up_proj", "shared_experts.down_proj"}, set()),
        ("moma", ["router"], {"scorer.weight"}, set()),
        ("dense", ["down_proj", "lm_head"], {"down_proj"}, {"lm_head"}),
    ],
)
def test_sites(name, sites, fragments, modules):
    targets = lora_targets(build(DECLARATIONS[name]), sites=sites)
    assert {end for place in targets["target_parameters"] for end in fragments if place.endswith(end)} == fragments
    assert all(place.endswith(tuple(fragments)) for place in targets["target_parameters"])
    assert set(targets["target_modules"]) == modules


def test_a_model_without_heads():
    model, ids = build(DECLARATIONS["moma"]).model, ids_like(DECLARATIONS["moma"])
    base = model(ids).last_hidden_state
    found = add_lora(model, r=2, init_lora_weights=False)
    hidden = found(ids).last_hidden_state
    assert not torch.allclose(hidden, base, atol=1e-2)
    torch.testing.assert_close(found.merge_and_unload()(ids).last_hidden_state, hidden)


def test_an_adapter_that_was_there_is_seen_through():
    plain = build(DECLARATIONS["mot_post"])
    wanted = lora_targets(plain)
    assert lora_targets(adapted(plain)) == wanted


class TestSavedReloadedMerged:
    @pytest.mark.parametrize("name", KINDS)
    def test_nothing_is_lost(self, name, tmp_path):
        config = DECLARATIONS[name]
        ids, plain = ids_like(config), build(config)
        before = weights(plain)
        base = plain(ids)
        model = adapted(plain, init_lora_weights=False)
        found = model(ids)
        assert not torch.allclose(found.logits, base.logits, atol=1e-2)
        model.save_pretrained(tmp_path)
        again = peft.PeftModel.from_pretrained(build(config), tmp_path)
        assert torch.equal(again(ids).logits, found.logits)
        merged = again.merge_and_unload()
        assert set(merged.state_dict()) == set(before)
        out = merged(ids)
        torch.testing.assert_close(out.logits, found.logits, atol=1e-5, rtol=1e-5)
        for one, other in zip(found.routings, out.routings, strict=True):
            assert (one is None) == (other is None)
            assert one is None or torch.equal(one.expert_ids, other.expert_ids)
        targets = set(lora_targets(merged)["target_parameters"])
        for place, value in merged.state_dict().items():
            assert torch.equal(value, before[place]) == (place not in targets), place

    def test_a_merged_model_is_saved_as_any_other(self, tmp_path):
        config = DECLARATIONS["moma"]
        model = adapted(build(config), init_lora_weights=False).merge_and_unload()
        model.save_pretrained(tmp_path)
        ids = ids_like(config)
        assert torch.equal(from_pretrained(tmp_path)(ids).logits, model(ids).logits)

    def test_the_head(self, tmp_path):
        """One that is the embedding too is refused: merged, an adapter would change what enters."""
        config = DECLARATIONS["dense"]
        ids = ids_like(config)
        model = adapted(build(config), sites=["lm_head"], init_lora_weights=False)
        found = model(ids).logits
        assert not torch.allclose(found, build(config)(ids).logits, atol=1e-2)
        merged = model.merge_and_unload()
        torch.testing.assert_close(merged(ids).logits, found)
        merged.save_pretrained(tmp_path)
        torch.testing.assert_close(from_pretrained(tmp_path)(ids).logits, found)

    @pytest.mark.parametrize("way", ["load_adapter", "the Auto class", "from_pretrained"])
    def test_transformers_and_omnimoe_read_it_too(self, way, tmp_path):
        config = DECLARATIONS["moma"]
        ids = ids_like(config)
        build(config).save_pretrained(tmp_path / "base")
        model = adapted(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), init_lora_weights=False)
        model.save_pretrained(tmp_path / "adapter")
        if way == "load_adapter":
            again = from_pretrained(tmp_path / "base")
            again.load_adapter(str(tmp_path / "adapter"))
        else:
            read = from_pretrained if way == "from_pretrained" else AutoModelForCausalLM.from_pretrained
            again = read(tmp_path / "adapter")
        assert torch.equal(again.eval()(ids).logits, model(ids).logits)

    @pytest.mark.parametrize("name", ["moe", "moma", "expert_choice"])
    def test_routing_of_the_first_layer_is_that_of_the_base_model(self, name):
        config = DECLARATIONS[name]
        ids, plain = ids_like(config), build(config)
        base = plain(ids).routings[0]
        model = adapted(plain, sites=["experts"], init_lora_weights=False)
        found, merged = model(ids).routings[0], None
        assert torch.equal(found.router_logits, base.router_logits)
        assert torch.equal(found.expert_ids, base.expert_ids)
        merged = model.merge_and_unload()(ids).routings[0]
        assert torch.equal(merged.expert_ids, base.expert_ids)
        assert torch.equal(merged.expert_weights, base.expert_weights)

    def test_two_adapters_take_turns(self):
        config = DECLARATIONS["moma"]
        ids = ids_like(config)
        model = adapted(build(config), init_lora_weights=False)
        first = model(ids).logits
        model.add_adapter("second", peft.LoraConfig(**lora_targets(build(config)), r=3, init_lora_weights=False))
        assert torch.equal(model(ids).logits, first)
        model.set_adapter("second")
        assert not torch.allclose(model(ids).logits, first, atol=1e-2)
        with model.disable_adapter():
            assert torch.equal(model(ids).logits, build(config)(ids).logits)

    @pytest.mark.parametrize("name", sorted(set(KINDS) & set(CACHED)))
    def test_it_generates(self, name):
        config = DECLARATIONS[name]
        ids = ids_like(config, length=4)
        model = adapted(build(config), init_lora_weights=False, task_type="CAUSAL_LM")
        told = {"max_new_tokens": 4, "do_sample": False}
        found = model.generate(input_ids=ids, **told)
        assert torch.equal(found, model.merge_and_unload().generate(input_ids=ids, **told))


class TestTraining:
    @pytest.mark.parametrize("name", ["mot_post", "moe"])
    def test_the_adapter_learns_and_the_model_stays(self, name):
        config = DECLARATIONS[name]
        ids, plain = ids_like(config), build(config)
        before = weights(plain)
        model = adapted(plain, task_type="CAUSAL_LM").train()
        first = model(input_ids=ids, labels=ids).loss
        train(model, ids)
        assert model(input_ids=ids, labels=ids).loss < first - 0.1
        after = weights(model.unload())
        assert all(torch.equal(after[place], value) for place, value in before.items())

    def test_gradients_are_those_without_recomputing(self):
        config = DECLARATIONS["moma_top_k"]
        ids, found = ids_like(config), []
        for recompute in (False, True):
            model = adapted(build(config), init_lora_weights=False).train()
            if recompute:
                model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
            model(input_ids=ids, labels=ids).loss.backward()
            found.append({place: value.grad for place, value in model.named_parameters() if value.requires_grad})
        assert found[0]
        for place, gradient in found[0].items():
            torch.testing.assert_close(gradient, found[1][place], msg=place)


class TestTowers:
    @pytest.mark.parametrize("name", TOWERS)
    def test_other_towers_stay_bitwise(self, name, tmp_path):
        config = DECLARATIONS[name]
        ids, plain = ids_like(config), build(config)
        before = weights(plain)
        model = add_lora(plain, towers=["image"], r=2).train()
        train(model, ids)
        model.save_pretrained(tmp_path)
        merged = model.merge_and_unload()
        self.check(config, before, weights(merged))
        # training goes on after a reload, and nothing has to be said again
        again = peft.PeftModel.from_pretrained(build(config), tmp_path, is_trainable=True)
        torch.testing.assert_close(again.eval()(ids).logits, merged.eval()(ids).logits, atol=1e-5, rtol=1e-5)
        train(again.train(), ids)
        self.check(config, before, weights(again.merge_and_unload()))

    def check(self, config, before, after):
        changed = set()
        for place, value in before.items():
            if torch.equal(after[place], value):
                continue
            assert value.ndim == 3, place
            copies = {i for i in range(len(value)) if not torch.equal(after[place][i], value[i])}
            own = self.copies_of_images(config, place, len(value))
            assert copies == own, place
            changed.add(place)
        assert changed

    @staticmethod
    def copies_of_images(config, place, count):
        if config is DECLARATIONS["moma"]:
            return {2, 3, 4} & set(range(count))
        if config is DECLARATIONS["attention_experts"]:
            return {2, 3, 4} if "self_attn" in place else set(range(count))
        if config is DECLARATIONS["attention_heads"] and place.rpartition(".self_attn.")[2][:1] in "qo":
            return set(range(count))
        if config is DECLARATIONS["merged"] and "mlp" in place:
            return {0}
        return {1}

    def test_two_towers(self):
        config = DECLARATIONS["mot_post"]
        ids, plain = ids_like(config), build(config)
        before = weights(plain)
        model = add_lora(plain, towers=["text", "speech"], sites=["attention"], r=2).train()
        train(model, ids)
        after = weights(model.merge_and_unload())
        moved = {place for place, value in before.items() if not torch.equal(value, after[place])}
        assert moved
        assert all("self_attn" in place for place in moved)
        for place in moved:
            same = [torch.equal(before[place][i], after[place][i]) for i in range(3)]
            assert same == [False, True, False], place

    def test_a_modality_has_its_projections_to_itself(self, colours):
        config = DECLARATIONS["mot"].replace(modalities=(TEXT, colours.Config(name="colours", placeholder_id=7)))
        model = build(config)
        targets = lora_targets(model, towers=["colours"], sites=["modalities"])
        places = ["model.modalities.colours.enter", "model.modalities.colours.leave"]
        assert targets == {"target_modules": places, "target_parameters": []}
        with pytest.raises(ValueError, match="an adapter of text alone has no place"):
            lora_targets(model, towers=["text"], sites=["modalities"])
        model = add_lora(model, towers=["colours"], sites=["modalities", "attention"], r=2, init_lora_weights=False)
        ids = torch.tensor([[1, 9, 7, 7, 10]])
        inputs = {"input_ids": ids, "features": {"colours": torch.rand(2, 3)}}
        found = model(**inputs)
        merged = model.merge_and_unload()(**inputs)
        torch.testing.assert_close(merged.predictions["colours"], found.predictions["colours"])

    def test_an_adapter_that_is_not_confined_does_not_train(self):
        model = build(DECLARATIONS["mot_post"])
        adapter = peft.get_peft_model(model, peft.LoraConfig(**lora_targets(model, towers=["image"]), r=2))
        assert not any(parameter.requires_grad for parameter in adapter.parameters())
        confine_lora(adapter, ["image"])
        trained = [place for place, value in adapter.named_parameters() if value.requires_grad]
        assert trained
        assert all("lora_" in place for place in trained)
        assert not adapter.peft_config["default"].inference_mode

    def test_an_adapter_of_transformers_own_making(self):
        config = DECLARATIONS["mot_post"]
        ids, model = ids_like(config), build(config)
        model.add_adapter(peft.LoraConfig(**lora_targets(model, towers=["speech"]), r=2))
        confine_lora(model, ["speech"])
        held = {place: value.clone() for place, value in model.named_parameters() if "lora_B" in place}
        train(model.train(), ids)
        moved = {place: value.unflatten(1, (2, 3)).ne(0).any((0, 1)).tolist() for place, value in
                 model.named_parameters() if "lora_B" in place}  # fmt: skip
        assert set(moved) == set(held)
        assert set(map(tuple, moved.values())) == {(False, False, True)}


class TestRefusals:
    @pytest.mark.parametrize(
        ("name", "given", "message"),
        [
            (
                "mot_post",
                {"towers": ["smell"]},
                "unknown tower 'smell'; the keys of this model are text, image",
            ),
            ("mot_post", {"towers": "image"}, "towers must be a list of names out of text, image, speech, got 'image'"),
            ("mot_post", {"towers": []}, "towers must be a list of names"),
            ("mot_post", {"sites": ["atention"]}, "unknown site 'atention'; the sites of this model are attention"),
            ("mot_post", {"sites": "attention"}, "sites must be a list of names out of attention, .*, got 'attention'"),
            ("mot_post", {"sites": []}, "sites must be a list"),
            ("mot_post", {"sites": ["router"]}, "unknown site 'router'"),
            ("chameleon", {"towers": ["image"], "bias": "all"}, "bias='all' trains the biases of every tower"),
            (
                "dense_tied",
                {"sites": ["lm_head"]},
                "lm_head is the embedding too .*leave it out, or",
            ),
            ("dense", {"towers": ["image"]}, "an adapter of image alone has no place; leave towers out"),
            ("moe", {"towers": ["image"]}, r"every weight of the chosen sites \(model.backbone.layers.0"),
        ],
    )
    def test_what_there_is_not(self, name, given, message):
        model = build(DECLARATIONS[name])
        before = weights(model)
        with pytest.raises(ValueError, match=message):
            add_lora(model, **given)
        assert set(model.state_dict()) == set(before)

    def test_a_quantised_bank(self):
        pytest.importorskip("torchao")
        model = quantize(build(DECLARATIONS["mot_post"]))
        with pytest.raises(ValueError, match=r"q_proj.weight is quantised.*merge it and quantise then"):
            add_lora(model)

    def test_a_model_of_another_kind(self):
        with pytest.raises(ValueError, match="a model of omnimoe is needed, got Linear"):
            lora_targets(torch.nn.Linear(2, 2))

    def test_confining_what_is_not_there(self):
        model = build(DECLARATIONS["merged"])
        with pytest.raises(ValueError, match="no LoRA adapter 'default'"):
            confine_lora(model, ["image"])
        whole = adapted(model, init_lora_weights=False)
        before = weights(whole)
        with pytest.raises(ValueError, match=r"is also on .*v_proj.weight, which rows of other towers than image meet"):
            confine_lora(whole, ["image"])
        assert all(torch.equal(value, before[place]) for place, value in whole.state_dict().items())

    def test_without_peft(self, monkeypatch):
        monkeypatch.setitem(sys.modules, "peft", None)
        with pytest.raises(ImportError, match=r"pip install 'omnimoe\[peft\]'"):
            add_lora(build(DECLARATIONS["dense"]))

"""Weights that are sound and not of this model: what is told, before memory is taken, and what can still be loaded."""

from __future__ import annotations

import logging

import pytest
import torch
from transformers import AutoModel, AutoModelForCausalLM

from omnimoe import CheckpointError, from_pretrained, shrink
from omnimoe.checkpoint.errors import MisfitError
from omnimoe.model import MODELS, OmniMoeForCausalLM, OmniMoeModel
from tests.checkpoint.files import edit, edit_json, load, same_weights, small
from tests.declarations import build
from tests.refusals import refused, unchanged

LAYER = "model.backbone.layers.0"
ROUTER = f"{LAYER}.mlp.router.scorer.weight"
GATE_UP = f"{LAYER}.mlp.experts.gate_up_proj"
DOWN = f"{LAYER}.mlp.experts.down_proj"
EVERY_WAY = [load, from_pretrained, AutoModelForCausalLM.from_pretrained]


def without(*names):
    return lambda weights: [weights.pop(name) for name in names]


def with_shape(name, *shape):
    return lambda weights: weights.update({name: torch.zeros(shape)})


class TestKeys:
    """Missing and unexpected: refused unless the caller says otherwise."""

    @pytest.mark.hazard(8)
    @pytest.mark.parametrize("by", EVERY_WAY)
    def test_a_missing_router_is_not_made_up(self, saved, by):
        edit(saved, without(ROUTER))
        with refused(saved, f"1 missing:\n  {ROUTER}", MisfitError):
            by(saved)

    @pytest.mark.hazard(8)
    @pytest.mark.parametrize(
        "name",
        [
            "lm_head.weight",
            "model.embed_tokens.weight",
            "model.norm.weight",
            GATE_UP,
            f"{LAYER}.self_attn.q_proj.weight",
            f"{LAYER}.mlp_norm.weight",
        ],
    )
    def test_a_missing_weight(self, saved, name):
        edit(saved, without(name))
        with refused(saved, f"1 missing:\n  {name}", MisfitError):
            load(saved)

    @pytest.mark.hazard(8)
    def test_a_part_of_all_layers(self, saved):
        edit(saved, without(ROUTER, ROUTER.replace(".0.", ".1.")))
        told = "2 missing:\n  model.backbone.layers.{0-1}.mlp.router.scorer.weight (2 times)"
        with refused(saved, told, MisfitError):
            load(saved)

    @pytest.mark.hazard(8)
    @pytest.mark.parametrize(
        "name", ["extra", f"{LAYER}.mlp.gate.weight", "model.backbone.layers.0.self_attn.q_proj.bias"]
    )
    def test_an_unexpected_weight(self, saved, name):
        edit(saved, with_shape(name, 3))
        with refused(saved, f"1 unexpected:\n  {name}", MisfitError):
            load(saved)

    @pytest.mark.hazard(8)
    def test_at_most_ten_are_listed(self, saved):
        edit(saved, lambda weights: weights.update({f"extra_{number}": torch.zeros(1) for number in range(25)}))
        with refused(saved, "25 unexpected:\n", MisfitError) as error:
            load(saved)
        assert str(error).count("extra_") == 10
        assert "and 15 more" in str(error)

    @pytest.mark.hazard(8)
    def test_other_numbers_of_layers_are_told_first(self, saved):
        edit_json(saved / "config.json", num_layers=3)
        with refused(saved, "config.json declares 3 layers, the weights are of 2", MisfitError):
            load(saved)

    @pytest.mark.hazard(8)
    def test_the_rest_can_be_loaded_and_what_is_fresh_is_named(self, saved, model, caplog):
        edit(saved, without(ROUTER))
        with caplog.at_level(logging.WARNING, logger="omnimoe.hub"), unchanged(saved, draws=True):
            loaded = from_pretrained(saved, strict=False)
        assert ROUTER in caplog.text
        rest = {name: tensor for name, tensor in loaded.state_dict().items() if name != ROUTER}
        assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in rest.items())

    @pytest.mark.hazard(8)
    def test_who_asks_for_the_report_gets_it(self, saved):
        """As the rest of transformers' tools do, which look for themselves."""
        edit(saved, without(ROUTER))
        with unchanged(saved, draws=True):
            _, report = load(saved, output_loading_info=True)
        assert set(report["missing_keys"]) == {ROUTER}

    def test_the_base_of_a_model_with_heads_and_the_other_way(self, saved, model, tmp_path):
        for by in (OmniMoeModel.from_pretrained, AutoModel.from_pretrained):
            assert same_weights(by(saved), model.model)
        model.model.save_pretrained(tmp_path / "base")
        assert same_weights(OmniMoeModel.from_pretrained(tmp_path / "base"), model.model)
        with refused(tmp_path / "base", "1 missing:\n  lm_head.weight", MisfitError):
            load(tmp_path / "base")
        headed = load(tmp_path / "base", strict=False)
        assert same_weights(headed.model, model.model)


class TestShapes:
    """Refused with the key and both shapes; nothing of that size is allocated first."""

    @pytest.mark.hazard(9)
    @pytest.mark.parametrize(
        ("name", "shape", "wanted"),
        [
            ("lm_head.weight", (41, 16), "(40, 16)"),
            ("model.embed_tokens.weight", (40, 17), "(40, 16)"),
            ("model.norm.weight", (2, 16), "(1, 16)"),
            ("model.norm.weight", (16,), "(1, 16)"),
            (ROUTER, (5, 16), "(4, 16)"),
            (GATE_UP, (3, 48, 16), "(4, 48, 16)"),
            (GATE_UP, (4, 16, 48), "(4, 48, 16)"),
            (DOWN, (4, 24, 16), "(4, 16, 24)"),
            (f"{LAYER}.self_attn.k_proj.weight", (1, 16, 16), "(1, 8, 16)"),
        ],
    )
    def test_another_shape(self, saved, name, shape, wanted):
        edit(saved, with_shape(name, *shape))
        with refused(saved, f"1 misshapen:\n  {name}: {shape} in the file, {wanted} in the model", MisfitError):
            load(saved)

    @pytest.mark.hazard(9)
    @pytest.mark.parametrize("by", EVERY_WAY)
    def test_another_number_of_experts(self, saved, by):
        plain = small().to_dict()["experts"] | {"num_experts": 6}
        edit_json(saved / "config.json", experts=plain)
        with refused(saved, f"{GATE_UP}: (4, 48, 16) in the file, (6, 48, 16) in the model", MisfitError):
            by(saved)

    @pytest.mark.hazard(9)
    def test_all_kinds_in_one_report(self, saved):
        edit(saved, without("lm_head.weight"))
        edit(saved, with_shape("extra", 1))
        edit(saved, with_shape("model.norm.weight", 3))
        for fragment in ("1 missing:", "1 unexpected:", "1 misshapen:", "strict=False loads the rest"):
            with refused(saved, fragment, MisfitError):
                load(saved)

    @pytest.mark.hazard(9)
    def test_a_change_of_vocabulary_can_be_asked_for(self, saved, model):
        edit(saved, with_shape("lm_head.weight", 50, 16))
        with unchanged(saved, draws=True):
            loaded = load(saved, ignore_mismatched_sizes=True)
        assert same_weights(loaded.model, model.model)
        assert loaded.lm_head.weight.shape == (40, 16)
        assert loaded.lm_head.weight.isfinite().all()

    @pytest.mark.hazard(9)
    def test_the_registered_models_that_are_near_are_named(self, tmp_path):
        """Weights of one model under the config of another, which is how wrong names usually come about."""
        build(shrink(MODELS.get("mot_nano")())).save_pretrained(tmp_path / "wrong")
        with torch.device("meta"):
            real = OmniMoeForCausalLM(MODELS.get("mot_nano")())
        edit(
            tmp_path / "wrong",
            lambda weights: (weights.clear(), weights.update(_of_one_byte(real))),
        )
        with refused(tmp_path, "mot_nano (52 weights fit)", MisfitError) as error:
            from_pretrained(tmp_path / "wrong")
        near = str(error).rpartition(": ")[2].split(", ")
        assert near[0] == "mot_nano (52 weights fit)"
        assert len(near) == 3


def _of_one_byte(model) -> dict[str, torch.Tensor]:
    """Weights of a model's names and shapes in the smallest float."""
    return {
        name: torch.zeros(tensor.shape, dtype=torch.float8_e4m3fn)
        for name, tensor in model.state_dict().items()
        if name != "lm_head.weight" or not model.config.tie_word_embeddings
    }


class TestDtypes:
    """Kinds of floating point are cast into each other, and nothing else is."""

    @pytest.mark.hazard(10)
    @pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int32, torch.int64, torch.bool, torch.complex64])
    @pytest.mark.parametrize("strict", [True, False])
    def test_numbers_of_another_kind(self, saved, dtype, strict):
        edit(saved, lambda weights: weights.update({DOWN: weights[DOWN].to(dtype)}))
        with refused(saved, "1 weights have a dtype that is not cast:\n  " + DOWN, MisfitError):
            load(saved, strict=strict)

    @pytest.mark.hazard(10)
    def test_whole_numbers_everywhere(self, saved):
        edit(saved, lambda weights: weights.update({name: weight.to(torch.int8) for name, weight in weights.items()}))
        with refused(saved, "quantised weights need their quantization_config in config.json", MisfitError):
            load(saved)

    @pytest.mark.hazard(10)
    @pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
    def test_other_floats_are_cast(self, saved, model, dtype):
        edit(saved, lambda weights: weights.update({name: weight.to(dtype) for name, weight in weights.items()}))
        with unchanged(saved):
            loaded = load(saved)
        assert {tensor.dtype for tensor in loaded.parameters()} == {torch.float32}
        wanted = {name: tensor.to(dtype).float() for name, tensor in model.state_dict().items()}
        assert all(torch.equal(tensor, wanted[name]) for name, tensor in loaded.state_dict().items())

    @pytest.mark.hazard(10)
    def test_a_norm_of_more_digits(self, saved, model):
        edit(saved, lambda weights: weights.update({"model.norm.weight": weights["model.norm.weight"].double()}))
        with unchanged(saved, model):
            loaded = load(saved)
        assert same_weights(loaded, model)


@pytest.mark.parametrize("kind", ["mot_hybrid", "transfusion", "dense_tied", "moe_sigmoid", "expert_choice"])
def test_every_kind_of_model_passes(kind, tmp_path):
    model = build(small(kind))
    model.save_pretrained(tmp_path)
    for by in EVERY_WAY:
        assert same_weights(by(tmp_path), model)


def test_a_missing_part_is_an_error_of_one_kind(saved):
    assert issubclass(MisfitError, CheckpointError)
    edit(saved, lambda weights: weights.clear() or weights.update(a=torch.zeros(1)))
    with refused(saved, "do not fit OmniMoeForCausalLM"):
        load(saved)

"""torchao itself on tiny models: the banks are integers afterwards, or nothing is."""

from __future__ import annotations

import json
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM

from omnimoe import Experts, QuantizationError, from_pretrained, load, quantize, register_expert
from omnimoe.experts import EXPERTS
from omnimoe.layers import BankLinear
from omnimoe.quantize import check_reach, is_quantized, matrices, torchao_config
from tests.declarations import DECLARATIONS, build, ids_like

torchao = pytest.importorskip("torchao.quantization")
from transformers import TorchAoConfig  # noqa: E402 - needs torchao

KINDS = ["dense", "mot_post", "chameleon", "merged", "moe", "moma", "static", "expert_choice", "mot_hybrid"]
KINDS += ["attention_experts", "attention_heads"]


def banks(model):
    return {name for name, weight in model.named_parameters() if weight.ndim == 3 and "norm" not in name}


def size(model):
    weights = [model.get_parameter(name) for name in banks(model)]
    held = [(weight.qdata, weight.scale) if is_quantized(weight) else (weight,) for weight in weights]
    return sum(part.numel() * part.element_size() for parts in held for part in parts)


@pytest.mark.parametrize("name", KINDS)
class TestEveryKind:
    def test_all_banks_and_nothing_else(self, name):
        config = DECLARATIONS[name]
        model, ids = build(config), ids_like(config)
        base, before, whole = model(ids).logits, dict(model.named_parameters()), size(model)
        assert quantize(model) is model
        reached = {place for place, weight in model.named_parameters() if is_quantized(weight)}
        assert reached == banks(model) == {place for place, _, _ in matrices(model)}
        assert all(model.get_parameter(place).qdata.dtype == torch.int8 for place in reached)
        assert all(model.get_parameter(place) is weight for place, weight in before.items() if place not in reached)
        assert size(model) < 0.55 * whole  # rows are short here, so that their scales weigh much
        logits = model(ids).logits
        assert 0 < (logits - base).abs().mean() < 0.06 * base.abs().mean()

    def test_what_is_saved_is_read_again(self, name, tmp_path):
        config = DECLARATIONS[name]
        ids = ids_like(config)
        build(config).save_pretrained(tmp_path / "plain")
        model = from_pretrained(tmp_path / "plain", quantization_config="int8")
        assert {place for place, weight in model.named_parameters() if is_quantized(weight)} == banks(model)
        assert torch.equal(model(ids).logits, quantize(build(config))(ids).logits)
        model.save_pretrained(tmp_path / "int8")
        again = from_pretrained(tmp_path / "int8")
        assert torch.equal(again(ids).logits, model(ids).logits)
        assert {place for place, weight in again.named_parameters() if is_quantized(weight)} == banks(model)


def test_each_number_is_near():
    model = build(DECLARATIONS["mot"])
    before = {place: weight.detach().clone() for place, weight in model.named_parameters()}
    quantize(model)
    for place in banks(model):
        row = before[place].abs().amax(-1, keepdim=True)
        assert ((model.get_parameter(place).dequantize() - before[place]).abs() <= row / 127).all(), place


def test_it_generates():
    config = DECLARATIONS["moma_top_k"]
    model = quantize(build(config))
    ids = ids_like(config, length=4)
    found = model.generate(ids, max_new_tokens=4, do_sample=False)
    expected = ids
    for _ in range(found.shape[1] - ids.shape[1]):
        expected = model.generate(expected, max_new_tokens=1, do_sample=False, use_cache=False)
    assert torch.equal(found, expected)


def test_through_the_auto_class(tmp_path):
    config = DECLARATIONS["mot"]
    build(config).save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config="int8")
    assert all(is_quantized(model.get_parameter(place)) for place in banks(model))


def test_a_config_by_name_of_every_bank(tmp_path):
    config = DECLARATIONS["mot_hybrid"]
    model = build(config)
    model.save_pretrained(tmp_path)
    with torch.device("meta"):
        declared = type(model)(config)
    given = torchao_config(declared, torchao.Float8WeightOnlyConfig(set_inductor_config=False))
    loaded = from_pretrained(tmp_path, quantization_config=given)
    assert {loaded.get_parameter(place).qdata.dtype for place in banks(loaded)} == {torch.float8_e4m3fn}
    ids = ids_like(config)
    assert (loaded(ids).logits - model(ids).logits).abs().mean() < 0.2 * model(ids).logits.abs().mean()


def test_a_model_of_the_zoo_is_a_quarter_as_large():
    model = load("moe_nano", num_layers=1)
    whole = size(model)
    assert size(quantize(model)) < 0.26 * whole


class TestRefusals:
    def test_a_config_that_sees_linear_layers_alone(self, tmp_path):
        build(DECLARATIONS["moma"]).save_pretrained(tmp_path)
        plain = TorchAoConfig(torchao.Int8WeightOnlyConfig(set_inductor_config=False))
        message = (
            r"leaves 100% of the weights of the layers as they are, model.backbone.layers.0.self_attn.q_proj.weight "
            r"among them.*quantization_config='int8'.*allow_partial=True"
        )
        for loading in (from_pretrained, AutoModelForCausalLM.from_pretrained):
            with pytest.raises(QuantizationError, match=message):
                loading(tmp_path, quantization_config=plain)
        model = from_pretrained(tmp_path, quantization_config=plain, allow_partial=True)
        assert not any(is_quantized(model.get_parameter(place)) for place in banks(model))

    def test_a_config_without_the_experts(self, tmp_path):
        model = build(DECLARATIONS["moma"])
        model.save_pretrained(tmp_path)
        only = {r"re:.*self_attn\.\w+_proj\.weight": torchao.Int8WeightOnlyConfig(set_inductor_config=False)}
        experts = sum(model.get_parameter(place).numel() for place in banks(model) if "experts" in place)
        share = experts / sum(model.get_parameter(place).numel() for place in banks(model))
        with pytest.raises(QuantizationError, match=f"leaves {share:.0%} .*experts.gate_up_proj among them"):
            from_pretrained(tmp_path, quantization_config=TorchAoConfig(torchao.FqnToConfig(only)))

    def test_a_kind_that_has_no_banks(self):
        model = build(DECLARATIONS["moe"])
        before = dict(model.named_parameters())
        kind = torchao.IntxWeightOnlyConfig(weight_dtype=torch.int4)
        with pytest.raises(QuantizationError, match=r"leaves 100% .*torchao says 'IntxWeightOnlyConfig only works for"):
            quantize(model, kind)
        assert all(weight is before[place] for place, weight in model.named_parameters())
        assert quantize(model, kind, allow_partial=True) is model
        assert all(weight is before[place] for place, weight in model.named_parameters())

    def test_sizes_that_a_kind_passes_over(self):
        model = build(DECLARATIONS["mot"])
        with pytest.raises(QuantizationError, match=r"torchao passes over weights of shape \(3, 16, 16\)|torchao says"):
            quantize(model, torchao.Int4WeightOnlyConfig())

    def test_a_bank_that_somebody_elses_part_holds_bare(self, tmp_path):
        """Nothing here knows how it is used, so it is told that it stays; banks of ours in such a part are reached."""

        @register_expert("bare_bank_of_a_test")
        class Bare(Experts):
            def __init__(self, config, *, hidden_size, num_modalities, layer_idx):
                super().__init__()
                self.bank = torch.nn.Parameter(torch.randn(3, hidden_size, hidden_size))
                self.held = BankLinear((0,) * num_modalities, hidden_size, hidden_size)

            def forward(self, x, rows):
                return self.held(torch.einsum("nd,gdf->nf", x, self.bank), rows), None

        try:
            model = build(DECLARATIONS["dense"].replace(experts=Bare.Config()))
            model.save_pretrained(tmp_path)
            message = r"leaves model.backbone.layers.0.mlp.bank \(3, 16, 16\) as it is, a bank that .*Bare holds bare"
            before = dict(model.named_parameters())
            with pytest.raises(QuantizationError, match=message):
                quantize(model)
            assert all(weight is before[place] for place, weight in model.named_parameters())
            with pytest.raises(QuantizationError, match=r"mlp.held.weight among them: .*or omnimoe.quantize\(model\)"):
                from_pretrained(tmp_path, quantization_config="int8")
            part = quantize(model, allow_partial=True).model.backbone.layers[0].mlp
            assert (is_quantized(part.bank), is_quantized(part.held.weight)) == (False, True)
            assert model(ids_like(model.config)).logits.isfinite().all()
        finally:
            EXPERTS.remove("bare_bank_of_a_test")

    def test_an_unknown_name(self, tmp_path):
        build(DECLARATIONS["dense"]).save_pretrained(tmp_path)
        with pytest.raises(QuantizationError, match="unknown quantization_config 'int9'; write 'int8'"):
            from_pretrained(tmp_path, quantization_config="int9")

    def test_a_part_of_a_model(self, tmp_path):
        build(DECLARATIONS["mot"]).save_pretrained(tmp_path)
        with pytest.raises(ValueError, match="load this one without and call omnimoe.quantize"):
            from_pretrained(tmp_path, towers=["text"], quantization_config="int8")

    def test_what_is_no_model(self):
        with pytest.raises(QuantizationError, match="Linear has no banks"):
            quantize(torch.nn.Linear(2, 2))

    def test_without_torchao(self, monkeypatch):
        monkeypatch.setitem(sys.modules, "torchao.quantization", None)
        with pytest.raises(ImportError, match=r"pip install 'omnimoe\[torchao\]'"):
            quantize(build(DECLARATIONS["dense"]))

    def test_a_whole_model_passes(self):
        model = build(DECLARATIONS["mot"])
        with pytest.raises(QuantizationError):
            check_reach(model)
        check_reach(quantize(model))


def test_the_folder_says_what_it_holds(tmp_path):
    build(DECLARATIONS["mot"]).save_pretrained(tmp_path / "plain")
    from_pretrained(tmp_path / "plain", quantization_config="int8").save_pretrained(tmp_path / "int8")
    told = json.loads((tmp_path / "int8" / "config.json").read_text())["quantization_config"]
    assert told["quant_method"] == "torchao"

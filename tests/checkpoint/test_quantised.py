"""Folders whose config names a quantisation: held to names, shapes and dtypes as others are, and to what it reaches."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, TorchAoConfig

from omnimoe import from_pretrained
from omnimoe.checkpoint.errors import MisfitError
from omnimoe.model import OmniMoeModel
from omnimoe.quantize import QuantizationError, is_quantized, matrices, torchao_config
from tests.checkpoint.files import WEIGHTS, edit_json, load
from tests.children import capped
from tests.refusals import refused

torchao = pytest.importorskip("torchao.quantization")

MEMORY = 512 << 20
"""Bytes that a child may take to refuse a quantisation."""
LAYER = "model.backbone.layers.0"
NORM = "model.norm.weight"
ROUTER = f"{LAYER}.mlp.router.scorer.weight"
DOWN = f"{LAYER}.mlp.experts.down_proj"
NUMBERS, SCALE = f"{LAYER}.mlp.experts._down_proj_qdata", f"{LAYER}.mlp.experts._down_proj_scale"
EVERY_WAY = [load, from_pretrained, AutoModelForCausalLM.from_pretrained]


@pytest.fixture(scope="module")
def original(model, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("quantised")
    model.save_pretrained(folder / "plain")
    load(folder / "plain", quantization_config="int8").save_pretrained(folder / "int8")
    return folder / "int8"


@pytest.fixture
def quantised(original, tmp_path) -> Path:
    return Path(shutil.copytree(original, tmp_path / "int8"))


def edit(folder: Path, change) -> None:
    """Changes weights in place; what torchao wrote about them stays."""
    with safe_open(folder / WEIGHTS, framework="pt") as held:
        told = held.metadata()
    weights = load_file(folder / WEIGHTS)
    change(weights)
    save_file(weights, folder / WEIGHTS, metadata=told)


CHANGES = {
    "extra": (lambda held: held.update(extra=torch.ones(1)), "1 unexpected:\n  extra"),
    "plain beside": (lambda held: held.update({DOWN: torch.ones(4, 16, 24)}), "unexpected"),
    "no router": (lambda held: held.pop(ROUTER), f"1 missing:\n  {ROUTER}"),
    "no numbers": (lambda held: held.pop(NUMBERS), f"1 missing:\n  {NUMBERS}"),
    "no scale": (lambda held: held.pop(SCALE), f"1 missing:\n  {SCALE}"),
    "norm": (lambda held: held.update({NORM: torch.ones(1, 17)}), f"{NORM}: (1, 17) in the file, (1, 16) in the model"),
    "numbers": (
        lambda held: held.update({NUMBERS: held[NUMBERS][:3].clone()}),
        f"{NUMBERS}: (3, 16, 24) in the file, (4, 16, 24) in the model",
    ),
    "scale": (
        lambda held: held.update({SCALE: held[SCALE][:2].clone()}),
        f"{SCALE}: (2, 16, 1) in the file, (4, 16, 1) in the model",
    ),
    "whole norm": (lambda held: held.update({NORM: held[NORM].to(torch.int8)}), f"{NORM}: I8 in the file, float32"),
    "whole scale": (lambda held: held.update({SCALE: held[SCALE].to(torch.int32)}), f"{SCALE}: I32 in the file, float"),
    "real numbers": (lambda held: held.update({NUMBERS: held[NUMBERS].float()}), f"{NUMBERS}: F32 in the file, int8"),
}


@pytest.mark.hazard(8, 9, 10)
@pytest.mark.parametrize("kind", CHANGES)
def test_what_does_not_fit(quantised, kind):
    change, fragment = CHANGES[kind]
    edit(quantised, change)
    for by in EVERY_WAY:
        with refused(quantised, fragment, MisfitError):
            by(quantised)


@pytest.mark.hazard(8)
def test_other_numbers_of_layers(quantised):
    edit_json(quantised / "config.json", num_layers=3)
    with refused(quantised, "config.json declares 3 layers, the weights are of 2", MisfitError):
        load(quantised)


def test_one_that_is_sound(quantised, original):
    for by in EVERY_WAY:
        loaded = by(quantised)
        assert all(is_quantized(loaded.get_parameter(name)) for name, _, _ in matrices(loaded))
    assert loaded(torch.arange(8)[None]).logits.isfinite().all()


def test_other_kinds_and_parts(model, tmp_path):
    """Eight-bit floats, and a quantisation that was allowed to leave the experts, which loading must be told again."""
    model.save_pretrained(tmp_path / "plain")
    floats = torchao_config(model, torchao.Float8WeightOnlyConfig(set_inductor_config=False))
    load(tmp_path / "plain", quantization_config=floats).save_pretrained(tmp_path / "floats")
    assert {load(tmp_path / "floats").get_parameter(DOWN).qdata.dtype} == {torch.float8_e4m3fn}
    attention = {r"re:.*self_attn\.\w+_proj\.weight": torchao.Int8WeightOnlyConfig(set_inductor_config=False)}
    part = TorchAoConfig(torchao.FqnToConfig(attention))
    load(tmp_path / "plain", quantization_config=part, allow_partial=True).save_pretrained(tmp_path / "part")
    with refused(tmp_path / "part", f"{DOWN.replace('down', 'gate_up')} among them", QuantizationError):
        load(tmp_path / "part")
    loaded = load(tmp_path / "part", allow_partial=True)
    assert is_quantized(loaded.get_parameter(f"{LAYER}.self_attn.q_proj.weight"))
    assert not is_quantized(loaded.get_parameter(DOWN))


@pytest.mark.hazard(10)
@pytest.mark.parametrize("by", EVERY_WAY)
def test_a_quantisation_that_reaches_nothing(saved, by):
    """Plain weights and a word in their config that promises otherwise."""
    edit_json(saved / "config.json", quantization_config={"quant_method": "fp8"})
    with refused(saved, "leaves 100% of the weights of the layers as they are", QuantizationError):
        by(saved)


@pytest.mark.hazard(8)
def test_an_unexpected_weight_beside_a_quantisation_of_others(saved):
    edit_json(saved / "config.json", quantization_config={"quant_method": "fp8"})
    weights = load_file(saved / WEIGHTS)
    save_file(weights | {"extra": torch.ones(1)}, saved / WEIGHTS, metadata={"format": "pt"})
    with refused(saved, "1 unexpected:\n  extra", MisfitError):
        load(saved, allow_partial=True)


@pytest.mark.hazard(12)
@pytest.mark.parametrize(
    ("quantisation", "fragment"),
    [
        ({"quant_method": "torchao"}, "cannot be used: KeyError('quant_type')"),
        ({"quant_method": "torchao", "quant_type": "int8_weight_only"}, "cannot be used: AssertionError"),
        ({"quant_method": "torchao", "quant_type": {"default": 3}}, "cannot be used: TypeError"),
        ({"quant_method": "torchao", "quant_type": {"default": {"_type": "os.system", "_data": {}}}}, "os.system"),
        ({"quant_method": "bitsandbytes"}, "says neither load_in_8bit nor load_in_4bit"),
        ({"quant_method": "fine_grained_fp8"}, "was quantised by 'fine_grained_fp8', which transformers does not know"),
    ],
    ids=range(6),
)
@capped(MEMORY)
def test_a_quantisation_that_means_nothing(saved, quantisation, fragment):
    edit_json(saved / "config.json", quantization_config=quantisation)
    for by in EVERY_WAY[:2]:
        with refused(saved, fragment):
            by(saved)


def test_the_base_alone_which_transformers_cannot_put_together(quantised):
    with refused(quantised, "load them with the class that they were saved from"):
        OmniMoeModel.from_pretrained(quantised)


@pytest.mark.hazard(12)
@capped(MEMORY)
def test_what_torchao_wrote_about_the_weights_is_gone(quantised):
    save_file(load_file(quantised / WEIGHTS), quantised / WEIGHTS, metadata={"format": "pt"})
    with refused(quantised, f"the quantised weights in {quantised} cannot be put together"):
        load(quantised)

"""ERNIE-4.5-VL's files, tiny and at full size: read and written to the bit, in either form of their config."""

from __future__ import annotations

import json
import shutil
from math import prod
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import Ernie4_5_VLMoeConfig, Ernie4_5_VLMoeForConditionalGeneration
from transformers.core_model_loading import revert_weight_conversion

from omnimoe import CheckpointError, convert_checkpoint, from_pretrained
from omnimoe.model import MODELS
from omnimoe.zoo.ernie4_5_vl.convert import ERNIE4_5_VL, ERNIE4_5_VL_FLAT, FLAT
from tests.zoo.ernie4_5_vl.tiny import SEEN, TEXT, VISION, batches, publish, reference
from tests.zoo.hollow import loads_and_saves, refuses
from tests.zoo.weights import assert_same_tensors, close, stored

FILE = "model.safetensors"
STATED = {"ernie4_5_vl_28b_a3b": (11_105, 29_399_294_336), "ernie4_5_vl_424b_a47b": (20_475, 423_526_285_184)}


@pytest.fixture(scope="module")
def theirs():
    return reference()


@pytest.fixture(scope="module")
def folder(theirs, tmp_path_factory) -> Path:
    return publish(theirs, tmp_path_factory.mktemp("published"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shards", ["5GB", "60KB"])
def test_there_and_back_keeps_every_bit(theirs, tmp_path, dtype, shards):
    """In half precision too, where routers and their biases stay as they are."""
    half = type(theirs)(theirs.config)
    half.load_state_dict(theirs.state_dict())
    for name, parameter in half.named_parameters():
        if not name.endswith(("gate.weight", "e_score_correction_bias")):
            parameter.data = parameter.data.to(dtype)
    first = publish(half, tmp_path / "first", max_shard_size=shards)
    plain = json.loads((first / "config.json").read_text())
    (first / "config.json").write_text(json.dumps({**plain, "dtype": str(dtype).removeprefix("torch.")}))
    held = stored(first)
    assert held["model.layers.1.mlp.gate.weight"].dtype == torch.float32
    convert_checkpoint(first, tmp_path / "ours", max_shard_size=shards)
    convert_checkpoint(tmp_path / "ours", tmp_path / "back", to="published")
    assert_same_tensors(stored(tmp_path / "back"), held)
    loaded, again = from_pretrained(first), from_pretrained(tmp_path / "ours")
    assert_same_tensors(loaded.state_dict(), again.state_dict())
    assert loaded.dtype == dtype
    router = loaded.model.backbone.layers[1].mlp.router.routers[1]
    assert {router.scorer.weight.dtype, router.expert_bias.dtype} == {torch.float32}
    convert_checkpoint(loaded, tmp_path / "model", to="published")
    assert_same_tensors(stored(tmp_path / "model"), held)
    assert loaded.to(torch.bfloat16).model.backbone.layers[1].mlp.router.routers[0].scorer.weight.dtype == torch.float32


def test_the_flat_form(theirs, folder, tmp_path):
    """The config that the weights were first published with, whose vision tower has names of its own."""
    old = tmp_path / "old"
    old.mkdir()
    renamed = {name.removeprefix("model.") if ".vision_model." in name else name: held
               for name, held in load_file(folder / FILE).items()}  # fmt: skip
    assert "vision_model.blocks.0.attn.qkv.weight" in renamed
    save_file(renamed, old / FILE, metadata={"format": "pt"})
    text = {name: value for name, value in TEXT.items() if name not in ("rope_parameters",)}
    flat = {
        **text,
        "model_type": FLAT,
        "moe_num_experts": [TEXT["moe_num_experts"]] * 2,
        "moe_layer_start_index": [1, 1],
        "moe_layer_end_index": [5, 4],
        "moe_layer_interval": 1,
        "freq_allocation": 2,
        "im_patch_id": SEEN,
        "spatial_conv_size": 2,
        "temporal_conv_size": 2,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500_000,
        "tie_word_embeddings": True,
        "vision_config": {**VISION, "embed_dim": VISION["hidden_size"], "mlp_ratio": 1.25, "hidden_act": "quick_gelu"},
    }
    with torch.device("meta"), pytest.raises(CheckpointError, match="outside the 60 rows"):
        ERNIE4_5_VL_FLAT.config_of(flat)  # a tiny vocabulary has no room for the published markers
    flat["vocab_size"] = 103_424
    wide = {**renamed, "model.embed_tokens.weight": torch.zeros(flat["vocab_size"], TEXT["hidden_size"])}
    wide["model.embed_tokens.weight"][: TEXT["vocab_size"]] = renamed["model.embed_tokens.weight"]
    save_file(wide, old / FILE, metadata={"format": "pt"})
    (old / "config.json").write_text(json.dumps(flat))
    ours = from_pretrained(old)
    assert ours.config.modalities[1].ids_of_spans == ((101_304, 101_305, SEEN), (101_306, 101_307, 103_367))
    words = torch.randint(3, 45, (2, 9))
    with torch.no_grad():
        close(ours(words).logits[..., : TEXT["vocab_size"]], theirs(words).logits)
    convert_checkpoint(ours, tmp_path / "back", to="published")
    assert_same_tensors(load_file(tmp_path / "back" / FILE), wide)
    assert json.loads((tmp_path / "back" / "config.json").read_text())["model_type"] == FLAT


def test_names_of_the_flat_form_under_a_nested_config(theirs, folder, tmp_path):
    shutil.copytree(folder, tmp_path / "mixed")
    renamed = {
        name.replace("model.vision_model.", "vision_model."): held for name, held in load_file(folder / FILE).items()
    }
    save_file(renamed, tmp_path / "mixed" / FILE, metadata={"format": "pt"})
    assert_same_tensors(from_pretrained(tmp_path / "mixed").state_dict(), from_pretrained(folder).state_dict())


def test_a_copy_of_transformers_takes_what_is_written_back(theirs, folder, tmp_path):
    ours = from_pretrained(folder)
    convert_checkpoint(ours, tmp_path / "back", to="published")
    again = Ernie4_5_VLMoeForConditionalGeneration.from_pretrained(tmp_path / "back").eval()
    mine, other = batches(ours)
    with torch.no_grad():
        real = mine["attention_mask"].bool()
        close(again(**other).logits[real], theirs(**other).logits[real], 1e-6)


WRONG = {
    "missing expert": (lambda held: held.pop("model.layers.1.mlp.experts.7.up_proj.weight"), r"experts\.7\.up_proj"),
    "missing router": (lambda held: held.pop("model.layers.2.mlp.gate.weight_1"), r"gate\.weight_1"),
    "missing bias": (
        lambda held: held.pop("model.layers.2.mlp.moe_statics.e_score_correction_bias"),
        r"1 missing:(.|\n)*may lack the correction biases of its routers as a whole",
    ),
    "extra expert": (
        lambda held: held.update({"model.layers.1.mlp.experts.12.down_proj.weight": torch.ones(32, 8)}),
        r"experts\.12\.down_proj",
    ),
    "wide pool for pictures": (
        lambda held: held.update({"model.layers.1.mlp.experts.6.down_proj.weight": torch.ones(32, 24)}),
        r"experts\.6\.down_proj(.|\n)*different sizes",
    ),
    "a wrapped model": (
        lambda held: [held.update({f"module.{name}": held.pop(name)}) for name in list(held)],
        r"carry the prefix 'module\.'",
    ),
}


def test_a_copy_without_any_correction_bias(folder, tmp_path, caplog):
    held = {name: tensor for name, tensor in load_file(folder / FILE).items() if "e_score_correction_bias" not in name}
    shutil.copy(folder / "config.json", tmp_path / "config.json")
    save_file(held, tmp_path / FILE, metadata={"format": "pt"})
    ours = from_pretrained(tmp_path)
    assert "has no correction biases of its routers, which it may lack" in caplog.text
    assert not any(tensor.any() for name, tensor in ours.state_dict().items() if name.endswith("expert_bias"))
    convert_checkpoint(ours, tmp_path / "back", to="published")
    assert_same_tensors(load_file(tmp_path / "back" / FILE), held)


@pytest.mark.parametrize(("change", "message"), WRONG.values(), ids=WRONG)
def test_a_key_that_does_not_fit_is_named(folder, tmp_path, change, message):
    held = load_file(folder / FILE)
    change(held)
    shutil.copy(folder / "config.json", tmp_path / "config.json")
    save_file(held, tmp_path / FILE, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=message):
        from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"use_bias": True}, "use_bias is True, and only False is converted"),
        ({"moe_k": 1}, "takes two or more"),
        ({"moe_intermediate_size": [24]}, "two pools of experts"),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 2, 2]}}, "for columns"),
        ({"hidden_act": "gelu_fast"}, "has no counterpart here"),
    ],
)
def test_a_config_that_asks_for_more_is_refused(folder, changes, message):
    plain = json.loads((folder / "config.json").read_text())
    with pytest.raises(CheckpointError, match=message):
        ERNIE4_5_VL.config_of({**plain, "text_config": {**plain["text_config"], **changes}})


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow if "424b" in name else ()) for name in STATED]
)
def test_full_size_is_the_published_list(name, tmp_path):
    """Names and shapes that transformers' class saves; the larger count is that of the published files."""
    config = MODELS.get(name)()
    with torch.device("meta"):
        plain = config.published["files"]["config.json"]
        other = Ernie4_5_VLMoeForConditionalGeneration(Ernie4_5_VLMoeConfig(**plain))
        state = {key: held for key, held in other.state_dict().items() if key not in other.all_tied_weights_keys}
        wanted = {key: tuple(held.shape) for key, held in revert_weight_conversion(other, state).items()}
    assert (len(wanted), sum(prod(shape) for shape in wanted.values())) == STATED[name]
    assert ERNIE4_5_VL.plan(loads_and_saves(name, wanted, tmp_path)).published == wanted
    changed = "model.layers.3.mlp.experts.70.down_proj.weight"
    refuses(name, wanted, tmp_path, changed, "model.layers.3.mlp.experts.140.down_proj.weight")

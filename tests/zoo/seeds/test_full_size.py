"""Seeds at full size, without memory: transformers' own model says which tensors a published file has."""

from __future__ import annotations

from functools import cache
from math import prod

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.core_model_loading import revert_weight_conversion

from omnimoe import CheckpointError, OmniMoeForCausalLM, from_pretrained, list_models, model_info
from omnimoe.convert import CONVERTERS
from omnimoe.model import MODELS
from tests.zoo.hollow import loads_and_saves, write_hollow

FAMILIES = ("llama", "qwen2", "qwen3", "mixtral", "olmoe", "deepseek", "gpt_oss", "ernie4_5")
SEEDS = sorted(name for family in FAMILIES for name in list_models(family=family))
LARGE = {
    "deepseek_v3",
    "moonlight_16b_a3b",
    "qwen3_30b_a3b",
    "mixtral_8x22b",
    "smollm2_360m",
    "qwen3_8b",
    "gpt_oss_120b",
    "ernie4_5_21b_a3b",
    "ernie4_5_300b_a47b",
}
NAMES = [pytest.param(name, marks=pytest.mark.slow if name in LARGE else ()) for name in SEEDS]
# Parameters as the authors or the files state them, where known; the bias of DeepSeek's routers is none.
STATED = {
    "smollm2_135m": 134_515_008,
    "smollm2_360m": 361_821_120,
    "smollm2_1_7b": 1_711_376_384,
    "qwen2_0_5b": 494_032_768,
    "qwen2_5_7b": 7_615_616_512,
    "qwen1_5_moe_a2_7b": 14_315_784_192,
    "qwen3_0_6b": 596_049_920,
    "qwen3_8b": 8_190_735_360,
    "qwen3_30b_a3b": 30_532_122_624,
    "mixtral_8x7b": 46_702_792_704,
    "mixtral_8x22b": 140_620_634_112,
    "olmoe_1b_7b": 6_919_161_856,
    "deepseek_v3": 671_026_404_352,
    "gpt_oss_20b": 20_914_757_184,
    "gpt_oss_120b": 116_829_156_672,
}


@cache
def published_keys(name: str) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor that transformers would save."""
    plain = dict(MODELS.get(name)().published["files"]["config.json"])
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(plain.pop("model_type"), **plain))
    held = model.state_dict()
    for twin in model.all_tied_weights_keys:
        held.pop(twin)
    return {key: tuple(tensor.shape) for key, tensor in revert_weight_conversion(model, held).items()}


@pytest.mark.parametrize("name", NAMES)
def test_the_exact_list_of_keys_loads_and_is_given_back(name, tmp_path):
    keys = published_keys(name)
    model = loads_and_saves(name, keys, tmp_path)
    assert model.dtype == torch.bfloat16
    plan = CONVERTERS.get(model.config.published["family"]).plan(model)
    assert plan.published == keys
    assert sum(map(prod, plan.published.values())) == sum(map(prod, plan.ours.values()))
    biases = sum(prod(shape) for key, shape in keys.items() if key.endswith("e_score_correction_bias"))
    assert sum(map(prod, keys.values())) - biases == model_info(name).total_params
    assert model_info(name).total_params == STATED.get(name, model_info(name).total_params)


@pytest.mark.parametrize("name", ["smollm2_135m", "mixtral_8x7b"])
def test_a_key_too_few_too_many_or_of_another_shape_is_named(name, tmp_path):
    keys = dict(published_keys(name))
    lacking = next(key for key in keys if (".3." in key and "down_proj" in key) or (".3." in key and ".w2." in key))
    shape = keys.pop(lacking)
    with pytest.raises(CheckpointError, match=r"(?s)1 missing:.*Likely cause: a file of the checkpoint is missing"):
        from_pretrained(write_hollow(tmp_path, name, keys), device="meta")
    with pytest.raises(CheckpointError, match=r"(?s)1 unexpected:\n  model.layers.*.more.*config is of a smaller"):
        from_pretrained(
            write_hollow(tmp_path, name, {**keys, lacking: shape, "model.layers.0.more": (3,)}), device="meta"
        )
    with pytest.raises(CheckpointError, match=r"(?s)1 misshapen:.*\(5, 7\) in the file.*models of different sizes"):
        from_pretrained(write_hollow(tmp_path, name, {**keys, lacking: (5, 7)}), device="meta")


def test_weights_of_another_size_are_refused_before_any_memory_is_taken(tmp_path):
    write_hollow(tmp_path, "smollm2_360m", published_keys("smollm2_135m"))
    with pytest.raises(CheckpointError, match="do not fit its config as a llama model"):
        from_pretrained(tmp_path)


def test_a_model_larger_than_the_memory_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="asks for 281 GB of weights"):
        from_pretrained(write_hollow(tmp_path, "mixtral_8x22b", published_keys("mixtral_8x22b")))


def test_every_seed_is_declared_by_what_is_published():
    for name in SEEDS:
        config = MODELS.get(name)()
        assert isinstance(OmniMoeForCausalLM, type)
        assert CONVERTERS.get(config.published["family"]).config_of(config.published["files"]).to_dict() == (
            config.to_dict()
        )
        assert config.modality_names == ("text",)
        assert config.is_causal

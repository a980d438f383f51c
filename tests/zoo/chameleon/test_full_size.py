"""Chameleon at full size, without memory: transformers' own model says which tensors a published file has."""

from __future__ import annotations

from functools import cache
from math import prod

import pytest
import torch
from transformers import AutoConfig, ChameleonForConditionalGeneration

from omnimoe import CheckpointError, from_pretrained, load, model_info
from omnimoe.hub import _describe
from omnimoe.model import MODELS, OmniMoeForCausalLM
from omnimoe.tokenizers.vq_autoencoder import VqAutoencoder
from omnimoe.zoo.chameleon import CHAMELEON
from omnimoe.zoo.chameleon.convert import code_of, with_decoder, word_of
from tests.zoo.hollow import loads_and_saves, write_hollow

NAMES = ["chameleon_7b", "chameleon_34b"]
AUTOENCODER, DECODER = 29_423_616, 39_294_851
STATED = {"chameleon_7b": (548, 7_043_090_432), "chameleon_34b": (756, 34_323_732_480)}


@cache
def published_keys(name: str) -> dict[str, tuple[int, ...]]:
    plain = dict(MODELS.get(name)().published["files"]["config.json"])
    with torch.device("meta"):
        model = ChameleonForConditionalGeneration(AutoConfig.for_model(plain.pop("model_type"), **plain))
    return {key: tuple(tensor.shape) for key, tensor in model.state_dict().items()}


@pytest.mark.parametrize("name", NAMES)
def test_the_exact_list_of_keys_loads_and_is_given_back(name, tmp_path):
    keys = published_keys(name)
    model = loads_and_saves(name, keys, tmp_path)
    assert model.dtype == torch.bfloat16
    card = {"license": "other", "license_name": "chameleon-research-license"}
    assert model.config.to_dict() == {**MODELS.get(name)().to_dict(), "dtype": "bfloat16", "card": card}
    plan = CHAMELEON.plan(model)
    assert plan.published == keys
    assert (len(keys), sum(map(prod, keys.values()))) == STATED[name]
    assert sum(map(prod, plan.ours.values())) == STATED[name][1]
    assert model_info(name).total_params == STATED[name][1] - AUTOENCODER


@pytest.mark.parametrize("name", [NAMES[0], pytest.param(NAMES[1], marks=pytest.mark.slow)])
def test_a_key_too_few_too_many_or_of_another_shape_is_named(name, tmp_path):
    keys = dict(published_keys(name))
    lacking = "model.layers.3.self_attn.k_norm.bias"
    shape = keys.pop(lacking)
    for changed, message in [
        (keys, r"(?s)1 missing:\n  model\.layers\.3\.self_attn\.k_norm\.bias.*a file of the checkpoint is missing"),
        ({**keys, lacking: shape, "model.layers.0.more": (3,)}, r"(?s)1 unexpected:\n  model\.layers\.0\.more"),
        ({**keys, lacking: (shape[0], 64)}, r"(?s)1 misshapen:.*models of different sizes"),
        (
            {f"model.{key}": held for key, held in {**keys, lacking: shape}.items()},
            r"(?s)its names carry the prefix 'model\.'",
        ),
    ]:
        with pytest.raises(CheckpointError, match=message):
            from_pretrained(write_hollow(tmp_path, name, changed), device="meta")


def test_the_decoder_at_full_size(tmp_path):
    """Its names and shapes are those of VQGAN: 39,294,851 numbers in 164 tensors."""
    with torch.device("meta"):
        held = VqAutoencoder.Config().build().state_dict()
    decoder = {f"model.vqmodel.{name}": tuple(held[name].shape) for name in held if name.startswith("decoder.")}
    assert (len(decoder), sum(map(prod, decoder.values()))) == (164, DECODER)
    assert decoder["model.vqmodel.decoder.up.4.block.2.conv2.weight"] == (512, 512, 3, 3)
    assert decoder["model.vqmodel.decoder.up.3.block.0.nin_shortcut.weight"] == (256, 512, 1, 1)
    assert decoder["model.vqmodel.decoder.conv_out.weight"] == (3, 128, 3, 3)
    keys = {**published_keys("chameleon_7b"), **decoder}
    model = from_pretrained(write_hollow(tmp_path, "chameleon_7b", keys), device="meta")
    assert CHAMELEON.plan(model).published == keys
    plain = MODELS.get("chameleon_7b")().published["files"]["config.json"]
    assert model.config.published["files"]["config.json"] == with_decoder(plain)


@pytest.mark.parametrize("name", NAMES)
def test_ids_are_those_of_the_published_tokenizer(name):
    config = MODELS.get(name)()
    text, image = config.token_ranges.values()
    assert (text.start, text.stop, image.start, image.stop, image.num_tokens) == (0, 65_536, 4, 8196, 1024)
    assert (image.begin_id, image.end_id) == (8197, 8196)
    assert (config.bos_token_id, config.pad_token_id, config.eos_token_id) == (0, 1, 2)
    assert config.modalities[1].codes == ()
    assert [code_of(word_of(code)) for code in (0, 13, 8191)] == [0, 13, 8191]
    assert config.norm_placement == ("post" if name == "chameleon_34b" else "pre")
    assert config.attention.qk_norm == "layer"


def test_the_licence_is_told_as_the_hub_takes_it():
    assert model_info("chameleon_7b").license == "Chameleon Research License"
    model = load("chameleon_7b", device="meta", num_layers=1)
    _describe(model, "chameleon_7b")
    card = model.config.card
    assert (card["license"], card["license_name"]) == ("other", "chameleon-research-license")
    assert model_info("chameleon_7b.twin").license == "Apache-2.0"


def test_a_whole_vocabulary_is_read(tmp_path):
    """65,536 words of the real size, in a config of ours too."""
    plain = MODELS.get("chameleon_7b")().published["files"]["config.json"]
    words = dict(plain["vocabulary_map"])
    words |= {f"Ġword_{place}": place for place in range(8712, 65_536)}
    config = CHAMELEON.config_of({**plain, "vocabulary_map": words, "num_hidden_layers": 1})
    config.save_pretrained(tmp_path)
    again = type(config).from_pretrained(tmp_path)
    assert len(again.published["files"]["config.json"]["vocabulary_map"]) == len(words)
    with torch.device("meta"):
        assert OmniMoeForCausalLM(again).num_parameters() > 0

"""Mamba beside transformers' own model under the same weights, read from a folder as it is published."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, DynamicCache, MambaForCausalLM

from omnimoe import CheckpointError, OmniMoeForCausalLM, convert_checkpoint, from_pretrained, model_info
from omnimoe.model import MODELS

CASES = {
    "plain": {},
    "untied": {"tie_word_embeddings": False, "time_step_rank": 7, "conv_kernel": 3},
    "biases": {"use_bias": True, "use_conv_bias": False, "expand": 3},
}
IDS = torch.randint(1, 61, (2, 70), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module", params=CASES)
def pair(request, tmp_path_factory) -> tuple[MambaForCausalLM, OmniMoeForCausalLM, str]:
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        "mamba", vocab_size=61, hidden_size=24, num_hidden_layers=2, state_size=5, **CASES[request.param]
    )
    theirs = MambaForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    folder = tmp_path_factory.mktemp("published")
    theirs.save_pretrained(folder)
    return theirs, from_pretrained(folder).eval(), folder


def close(found: torch.Tensor, wanted: torch.Tensor) -> None:
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_logits_and_left_padding(pair):
    theirs, ours, _ = pair
    close(ours(IDS).logits, theirs(IDS).logits)
    mask = torch.ones_like(IDS)
    mask[1, :9] = 0
    # beside padding, the bias of their projection in would enter the convolution
    close(ours(IDS, attention_mask=mask).logits[1, 9:], theirs(IDS[1:, 9:]).logits[0])


@torch.no_grad()
def test_cached_steps(pair):
    theirs, ours, _ = pair
    cache, other = DynamicCache(config=ours.config), DynamicCache(config=theirs.config)
    for first, stop in ((0, 60), *((at, at + 1) for at in range(60, 64))):
        found = ours(IDS[:, first:stop], past_key_values=cache).logits
        close(found, theirs(IDS[:, first:stop], cache_params=other, use_cache=True).logits)
    for layer in range(2):
        close(cache.layers[layer].recurrent_states[0], other.layers[layer].recurrent_states[0])
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    assert torch.equal(ours.generate(IDS, **options), theirs.generate(IDS, **options))


def test_gradients(pair):
    theirs, ours, _ = pair
    for model in pair[:2]:
        model.zero_grad()
        out = model(IDS, labels=IDS)
        out.loss.backward()
    wanted = dict(theirs.named_parameters())
    for name, parameter in ours.named_parameters():
        place = {"model.embed_tokens": "backbone.embeddings", "model.norm": "backbone.norm_f", "lm_head": "lm_head"}
        prefix = name.rpartition(".")[0]
        if prefix in place:
            published = f"{place[prefix]}.weight"
        else:
            published = name.replace("model.backbone.", "backbone.").replace(".self_attn.", ".mixer.")
            published = published.replace(".attention_norm.", ".norm.").replace(".conv.", ".conv1d.")
            published = published.replace(".rates.", ".")
        close(parameter.grad.flatten(), wanted[published].grad.flatten())


def test_written_back(pair, tmp_path):
    theirs, ours, folder = pair
    convert_checkpoint(ours, tmp_path / "again", to="published")
    wanted, found = (load_file(f"{place}/model.safetensors") for place in (folder, tmp_path / "again"))
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    again = MambaForCausalLM.from_pretrained(tmp_path / "again").eval()
    with torch.no_grad():
        assert torch.equal(again(IDS).logits, theirs(IDS).logits)


def test_other_activations_are_refused(pair, tmp_path):
    config = json.loads((pair[2] / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"hidden_act": "gelu"}))
    (tmp_path / "model.safetensors").write_bytes((pair[2] / "model.safetensors").read_bytes())
    with pytest.raises(CheckpointError, match="hidden_act is 'gelu', and only 'silu' is converted"):
        from_pretrained(tmp_path)


@pytest.mark.parametrize("size", ["130m", "2_8b"])
def test_published_sizes_have_the_counts_of_transformers(size):
    config = MODELS.get(f"mamba_{size}")()
    sizes = {"hidden_size": config.hidden_size, "num_hidden_layers": config.num_layers}
    with torch.device("meta"):
        theirs = MambaForCausalLM(AutoConfig.for_model("mamba", vocab_size=50_280, **sizes))
    assert model_info(f"mamba_{size}").total_params == sum(held.numel() for held in theirs.parameters())

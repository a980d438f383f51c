"""Latent attention: what a cache keeps, copies by key, what it costs; transformers' is the oracle of the numbers."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import DynamicCache

from omnimoe import ConfigError, FeedForward, LatentAttention, OmniMoeConfig, OmniMoeForCausalLM, Tokens
from omnimoe.flops import active_params, flops, formulas, total_params

LATENT = LatentAttention.Config(num_heads=4, query_rank=12, latent_rank=8, plain_dim=6, rope_dim=4, value_dim=5)
MODEL = OmniMoeConfig(
    hidden_size=16,
    num_layers=2,
    modalities=(Tokens.Config(name="text", vocab_size=20), Tokens.Config(name="image", vocab_size=12)),
    attention=LATENT,
    experts=FeedForward.Config(intermediate_size=24),
    initializer_range=0.2,
)
IDS = torch.tensor([[1, 2, 21, 22, 3, 4, 25, 5]])


def build(config: OmniMoeConfig) -> OmniMoeForCausalLM:
    torch.manual_seed(0)
    return OmniMoeForCausalLM(config).eval()


@torch.no_grad()
@pytest.mark.parametrize("query_rank", [12, None])
def test_a_cache_keeps_one_narrow_vector_a_token(query_rank):
    model = build(MODEL.replace(attention=LATENT.replace(query_rank=query_rank)))
    cache = DynamicCache()
    found = [model(IDS[:, :5], past_key_values=cache).logits]
    found += [model(IDS[:, at : at + 1], past_key_values=cache).logits for at in range(5, 8)]
    torch.testing.assert_close(torch.cat(found, dim=1), model(IDS).logits, atol=1e-5, rtol=1e-5)
    assert cache.layers[0].keys.shape == (1, 1, 8, LATENT.latent_rank)
    assert cache.layers[0].values.shape == (1, 1, 8, LATENT.rope_dim)


@torch.no_grad()
def test_equal_towers_are_the_shared_model():
    shared = build(MODEL)
    untied = build(MODEL.replace(attention=LATENT.replace(towers="modality")))
    held = dict(shared.named_parameters())
    for name, parameter in untied.named_parameters():
        parameter.copy_(held[name].expand_as(parameter))
    torch.testing.assert_close(untied(IDS).logits, shared(IDS).logits, atol=1e-5, rtol=1e-5)
    attention = untied.model.backbone.layers[0].self_attn
    assert attention.q_up_proj.num_copies == attention.o_proj.num_copies == attention.kv_norm.num_copies == 2
    assert attention.kv_up_proj.num_copies == 1, "it works on what a cache held"
    attention.o_proj.weight[1].zero_()
    changed = (untied(IDS).logits - shared(IDS).logits).abs().amax(-1)[0] > 1e-4
    assert changed[2:4].all()
    assert not changed[:2].any(), "text before the picture meets its own copies"


def test_every_weight_takes_part():
    model = build(MODEL.replace(attention=LATENT.replace(towers="modality", bias=True, output_bias=True))).train()
    model(IDS, labels=IDS).loss.backward()
    assert [name for name, parameter in model.named_parameters() if parameter.grad is None] == []


@pytest.mark.parametrize("query_rank", [12, None])
def test_what_it_costs(query_rank):
    config = MODEL.replace(attention=LATENT.replace(query_rank=query_rank), tie_word_embeddings=True)
    assert active_params(config) == total_params(config)
    model = build(config)
    with FlopCounterMode(display=False, custom_mapping=formulas()) as counter:
        model(IDS)
    assert counter.get_total_flops() == flops(config, IDS).total


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"latent_rank": 0}, "latent_rank must be at least 1, got 0"),
        ({"num_heads": -1}, "num_heads must be at least 1"),
    ],
)
def test_sizes_that_cannot_be_are_refused(values, message):
    with pytest.raises(ConfigError, match=message):
        LATENT.replace(**values)


def test_a_rotary_part_of_odd_width_is_refused():
    with pytest.raises(ConfigError, match="head_dim must be even, got 3"):
        build(MODEL.replace(attention=LATENT.replace(rope_dim=3)))(IDS)

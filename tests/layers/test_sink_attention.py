"""Sinks and windows, against a loop over positions; transformers' gpt-oss is the oracle of the whole model."""

from __future__ import annotations

import math

import pytest
import torch

from omnimoe import ConfigError, FeedForward, OmniMoeConfig, OmniMoeForCausalLM, SinkAttention, Tokens
from omnimoe.layers import AttentionMask

HEADS, KV, WIDTH, LENGTH = 4, 2, 3, 7
CONFIG = SinkAttention.Config(num_heads=HEADS, num_kv_heads=KV, head_dim=WIDTH, rope=None)


@pytest.mark.parametrize("window", [None, 1, 3, 50])
def test_one_position_after_the_other(window):
    torch.manual_seed(0)
    attention = CONFIG.replace(window=window).build(hidden_size=8, num_modalities=1, layer_idx=0)
    with torch.no_grad():
        attention.sinks.copy_(torch.randn(HEADS))
    query = torch.randn(1, HEADS, LENGTH, WIDTH)
    key, value = torch.randn(2, 1, KV, LENGTH, WIDTH)
    keys = torch.zeros(1, LENGTH, dtype=torch.int64)
    mask = AttentionMask(
        rule="causal",
        query_length=LENGTH,
        key_length=LENGTH,
        past_length=0,
        device=query.device,
        key_ids=keys,
    )
    mixed, weights = attention._attend(query, key, value, mask)
    for head in range(HEADS):
        for at in range(LENGTH):
            seen = range(max(0, at + 1 - (window or LENGTH)), at + 1)
            scores = [float(query[0, head, at] @ key[0, head // 2, other]) / math.sqrt(WIDTH) for other in seen]
            total = sum(map(math.exp, scores)) + math.exp(attention.sinks[head].detach())
            pairs = zip(scores, seen, strict=True)
            wanted = sum(math.exp(score) / total * value[0, head // 2, other] for score, other in pairs)
            torch.testing.assert_close(mixed[0, at, head], wanted, atol=1e-5, rtol=1e-5)
            assert float(weights[0, head, at].sum()) < 1, "a part goes to nothing"


@torch.no_grad()
def test_a_cached_step_sees_the_same_window():
    config = OmniMoeConfig(
        hidden_size=12,
        num_layers=2,
        modalities=(Tokens.Config(name="text", vocab_size=20),),
        attention=SinkAttention.Config(num_heads=2, window=3),
        experts=FeedForward.Config(intermediate_size=16),
        initializer_range=0.3,
    )
    model = OmniMoeForCausalLM(config).eval()
    ids = torch.arange(1, 10).unsqueeze(0)
    whole, held = model(ids).logits, model(ids[:, :4], use_cache=True)
    for at in range(4, 9):
        held = model(ids[:, at : at + 1], past_key_values=held.past_key_values)
        torch.testing.assert_close(held.logits[:, 0], whole[:, at], atol=1e-5, rtol=1e-5)
    far = ids.clone()
    far[0, 0] = 15
    assert torch.equal(model(far).logits[:, 5:], whole[:, 5:]), "two layers of three positions reach no further back"
    assert not torch.equal(model(far).logits[:, 4], whole[:, 4])


def test_a_window_of_nothing_is_refused():
    with pytest.raises(ConfigError, match="window must be at least 1, got 0"):
        CONFIG.replace(window=0)

"""Readers and what they read, against a loop over positions."""

from __future__ import annotations

import math

import pytest
import torch

from omnimoe import (
    Attention,
    ConfigError,
    FeedForward,
    OmniMoeConfig,
    OmniMoeForCausalLM,
    ReaderAttention,
    Rope,
    Tokens,
)
from omnimoe.flops import active_params, flops, total_params
from omnimoe.layers import AttentionMask, RowLayout

HEADS, KV, WIDTH = 4, 2, 4
CONFIG = ReaderAttention.Config(
    num_heads=HEADS,
    num_kv_heads=KV,
    head_dim=WIDTH,
    rope=Rope.Config(theta=100.0),
    towers=(0, 1),
    readers=(False, True),
)


def unit(x: torch.Tensor, norm) -> torch.Tensor:
    return x / (x.square().mean() + norm.eps).sqrt() * norm.weight[0]


def turned(x: torch.Tensor, at: int) -> torch.Tensor:
    angle = at * torch.tensor([1.0, 100.0**-0.5])
    low, high = x[:2], x[2:]
    return torch.cat((low * angle.cos() - high * angle.sin(), high * angle.cos() + low * angle.sin()))


@torch.no_grad()
def test_one_position_after_the_other():
    torch.manual_seed(0)
    attention = CONFIG.build(hidden_size=8, num_modalities=2, layer_idx=0)
    for parameter in attention.parameters():
        parameter.copy_(torch.randn_like(parameter))
    keys = torch.tensor([[0, 1, 0, 1, 1]])
    rows = RowLayout.build(keys, num_keys=2)
    x = torch.randn(1, 5, 8)
    placed = rows.with_rotary(*Rope(CONFIG.rope, head_dim=WIDTH).table(rows.to_rows(torch.arange(5).view(1, 5, 1))))
    mask = AttentionMask(rule="causal", query_length=5, key_length=5, past_length=0, device=x.device, key_ids=keys)
    found = rows.to_time(attention(placed.to_rows(x), placed, mask)[0])[0]
    for at in range(5):
        tower = int(keys[0, at])
        query = (attention.q_proj.weight[tower] @ x[0, at]).view(HEADS, WIDTH)
        mixed = []
        for head in range(HEADS):
            asks = turned(unit(query[head], attention.q_norm) if tower else query[head], at)
            scores, values = [], []
            for other in range(at + 1):
                kind = int(keys[0, other])
                key = (attention.k_proj.weight[kind] @ x[0, other]).view(KV, WIDTH)[head // 2]
                norm = attention.k_norm if kind else attention.read_norm if tower else None
                key = turned(key if norm is None else unit(key, norm), other)
                scores.append(float(asks @ key) / math.sqrt(WIDTH))
                values.append((attention.v_proj.weight[kind] @ x[0, other]).view(KV, WIDTH)[head // 2])
            weights = torch.tensor(scores).softmax(0)
            mixed.append(sum(weight * value for weight, value in zip(weights, values, strict=True)))
        wanted = attention.o_proj.weight[tower] @ torch.cat(mixed)
        torch.testing.assert_close(found[at], wanted, atol=1e-4, rtol=1e-4)


MODEL = OmniMoeConfig(
    hidden_size=16,
    num_layers=2,
    modalities=(Tokens.Config(name="text", vocab_size=20), Tokens.Config(name="code", vocab_size=10)),
    attention=CONFIG,
    experts=FeedForward.Config(intermediate_size=16, towers=(0, 1)),
    initializer_range=0.3,
)


@torch.no_grad()
def test_a_cache_holds_both_faces():
    torch.manual_seed(0)
    model = OmniMoeForCausalLM(MODEL).eval()
    ids = torch.tensor([[1, 2, 25, 3, 26, 27, 4]])
    whole, held = model(ids).logits, model(ids[:, :3], use_cache=True)
    for at in range(3, 7):
        held = model(ids[:, at : at + 1], past_key_values=held.past_key_values)
        torch.testing.assert_close(held.logits[:, -1], whole[:, at], atol=1e-5, rtol=1e-5)
    assert held.past_key_values.layers[0].keys.shape[-1] == 2 * held.past_key_values.layers[0].values.shape[-1]
    model.set_attn_implementation("eager")
    torch.testing.assert_close(model(ids).logits, whole, atol=1e-5, rtol=1e-5)


def test_its_cost_is_counted():
    batch = {"input_ids": torch.ones(1, 8, dtype=torch.int64)}
    plain = MODEL.replace(attention=Attention.Config(num_heads=HEADS, num_kv_heads=KV, head_dim=WIDTH, towers=(0, 1)))
    # scores over two faces in the place of one
    more = MODEL.num_layers * 8 * 8 * 2 * HEADS * WIDTH
    assert flops(MODEL, batch).total == flops(plain, batch).total + more
    assert active_params(MODEL) == active_params(plain) + MODEL.num_layers * 3 * WIDTH
    assert total_params(MODEL) == total_params(plain) + MODEL.num_layers * 3 * WIDTH


def test_what_does_not_fit_is_refused():
    with pytest.raises(ConfigError, match=r"readers \(True,\) has 1 entries for 2 keys"):
        CONFIG.replace(readers=(True,)).build(hidden_size=16, num_modalities=2, layer_idx=0)
    with pytest.raises(ConfigError, match="readers have the qk_norm 'rms', got 'none'"):
        CONFIG.replace(qk_norm="none")
    with pytest.raises(ConfigError, match="leave qk_norm out of site_towers"):
        CONFIG.replace(site_towers={"qk_norm": (0, 1)})

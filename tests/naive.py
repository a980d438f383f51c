"""The model as a loop over positions with explicit matrices: slow, plain, and without any of the package's layers.

It reads a model's parameters by name and repeats the equations position by position: the tower of a position by its
key, attention as a sum over the positions it may see, no packing, no sorting, no banks.
"""

from __future__ import annotations

import torch
from torch import Tensor

from omnimoe.layers import resolve_towers
from omnimoe.model import OmniMoeForCausalLM


def rms(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return weight * x / torch.sqrt((x * x).mean(-1, keepdim=True) + eps)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    return weight * centred / torch.sqrt((centred * centred).mean(-1, keepdim=True) + eps) + bias


def rotate(x: Tensor, position: int, theta: float) -> Tensor:
    """``(H, C)`` turned pair by pair, the pairs ``(i, i + C/2)``."""
    half = x.shape[-1] // 2
    turned = x.clone()
    for pair in range(half):
        angle = torch.tensor(position * theta ** (-2 * pair / x.shape[-1]), dtype=x.dtype)
        first, second = x[:, pair], x[:, half + pair]
        turned[:, pair] = first * angle.cos() - second * angle.sin()
        turned[:, half + pair] = second * angle.cos() + first * angle.sin()
    return turned


def naive_logits(
    model: OmniMoeForCausalLM, input_ids: Tensor, keys: Tensor, valid: Tensor, blocks: Tensor | None = None
) -> Tensor:
    """``(B, T, V)`` logits of a model with feed-forward experts; zeros at padding.

    Args:
        model: a model whose experts are all ``FeedForward`` with silu and a gate.
        input_ids: ``(B, T)``.
        keys: ``(B, T)``, the tower key of each position.
        valid: ``(B, T)`` bool.
        blocks: ``(B, T)`` numbers of bidirectional blocks, -1 for none.
    """
    config, state = model.config, {name: value.double() for name, value in model.state_dict().items()}
    logits = torch.zeros(*input_ids.shape, config.vocab_size, dtype=torch.float64)
    for batch in range(len(input_ids)):
        places = [t for t in range(input_ids.shape[1]) if valid[batch, t]]
        key = {t: int(keys[batch, t]) for t in places}
        x = {t: state["model.embed_tokens.weight"][input_ids[batch, t]] for t in places}

        def may_see(t: int, s: int, batch: int = batch, key: dict = key) -> bool:
            if config.mask == "bidirectional":
                return True
            if config.mask == "one_way":
                return s <= t and key[s] <= key[t]
            same = config.mask == "block_causal" and blocks[batch, s] >= 0 and blocks[batch, s] == blocks[batch, t]
            return s <= t or bool(same)

        for layer, block in enumerate(config.blocks):
            root = f"model.backbone.layers.{layer}."

            def bank(name: str, towers, t: int, root: str = root, key: dict = key) -> Tensor:
                return state[root + name][resolve_towers(towers, config.num_keys)[key[t]]]

            attention, is_pre = block.attention, block.norm_placement == "pre"
            norm, site = block.norm, lambda name, a=attention: a.site_towers.get(name, a.towers)
            heads, kv_heads = attention.num_heads, attention.num_kv_heads or attention.num_heads
            width = attention.head_dim or config.hidden_size // heads
            query, keys_, value, mixed = {}, {}, {}, {}
            for t in places:
                h = rms(x[t], bank("attention_norm.weight", norm.towers, t), norm.eps) if is_pre else x[t]

                def project(name: str, count: int, h: Tensor = h, t: int = t, a=attention, bank=bank) -> Tensor:
                    towers = a.site_towers.get(name, a.towers)
                    y = bank(f"self_attn.{name}.weight", towers, t) @ h
                    if a.bias:
                        y = y + bank(f"self_attn.{name}.bias", towers, t)
                    return y.view(count, -1)

                query[t], keys_[t] = project("q_proj", heads), project("k_proj", kv_heads)
                value[t] = project("v_proj", kv_heads)
                for name, held in (("q_norm", query), ("k_norm", keys_)):
                    if attention.qk_norm == "rms":
                        held[t] = rms(
                            held[t], bank(f"self_attn.{name}.weight", site("qk_norm"), t), attention.qk_norm_eps
                        )
                    elif attention.qk_norm == "layer":
                        scale, shift = (
                            bank(f"self_attn.{name}.{part}", site("qk_norm"), t) for part in ("weight", "bias")
                        )
                        held[t] = layer_norm(held[t], scale, shift, attention.qk_norm_eps)
                    held[t] = rotate(held[t], t, attention.rope.theta)
            for t in places:
                out = []
                for head in range(heads):
                    group = head // (heads // kv_heads)
                    seen = [s for s in places if may_see(t, s)]
                    scores = torch.stack([query[t][head] @ keys_[s][group] for s in seen]) / width**0.5
                    shares = torch.exp(scores - scores.max())
                    shares = shares / shares.sum()
                    out.append(sum(share * value[s][group] for share, s in zip(shares, seen, strict=True)))
                y = bank("self_attn.o_proj.weight", site("o_proj"), t) @ torch.cat(out)
                if attention.output_bias:
                    y = y + bank("self_attn.o_proj.bias", site("o_proj"), t)
                mixed[t] = y
            for t in places:
                scale = bank("attention_norm.weight", norm.towers, t)
                x[t] = x[t] + (mixed[t] if is_pre else rms(mixed[t], scale, norm.eps))
                scale = bank("mlp_norm.weight", norm.towers, t)
                h = rms(x[t], scale, norm.eps) if is_pre else x[t]
                gate, up = (bank("mlp.experts.gate_up_proj", block.experts.towers, t) @ h).chunk(2)
                y = bank("mlp.experts.down_proj", block.experts.towers, t) @ (gate * torch.sigmoid(gate) * up)
                x[t] = x[t] + (y if is_pre else rms(y, scale, norm.eps))
        for t in places:
            copy = resolve_towers(config.final_norm.towers, config.num_keys)[key[t]]
            x[t] = rms(x[t], state["model.norm.weight"][copy], config.final_norm.eps)
            logits[batch, t] = state["lm_head.weight"] @ x[t]
    return logits

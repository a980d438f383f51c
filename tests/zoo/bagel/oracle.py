"""BAGEL from its formulas and its table of keys: one token after another, in float64, over the published tensors.

Written from the description of the model, apart from our implementation: every tensor is looked up under its published
name, every mask entry is decided by a sentence, and nothing is shared with the package.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from tests.zoo.bagel.documents import LLM, VIT, Document, Latent, Seen, Text

BOS, EOS, BEGIN, END = 151_644, 151_645, 151_652, 151_653
HEADS, KV_HEADS = LLM["num_attention_heads"], LLM["num_key_value_heads"]
HEAD = LLM["hidden_size"] // HEADS


def linear(weights: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
    """A linear map under its published name."""
    return F.linear(x, weights[f"{name}.weight"], weights.get(f"{name}.bias"))


def norm(weights: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
    """LayerNorm of the vision encoder."""
    return F.layer_norm(x, x.shape[-1:], weights[f"{name}.weight"], weights[f"{name}.bias"], 1e-6)


def rms(weight: Tensor, x: Tensor) -> Tensor:
    """RMSNorm."""
    return weight * x / (x.square().mean(-1, keepdim=True) + LLM["rms_norm_eps"]).sqrt()


def vision(weights: dict[str, Tensor], patches: Tensor) -> Tensor:
    """A picture through the vision encoder, the connector and its table of places."""
    tall, wide, _ = patches.shape
    side = VIT["image_size"] // VIT["patch_size"]
    places = torch.tensor([row * side + column for row in range(tall) for column in range(wide)])
    root = "vit_model.vision_model"
    x = linear(weights, f"{root}.embeddings.patch_embedding", patches.reshape(-1, patches.shape[2]).double())
    x = x + weights[f"{root}.embeddings.position_embedding.weight"][places]
    heads = VIT["num_attention_heads"]
    for index in range(VIT["num_hidden_layers"] - 1):
        name = f"{root}.encoder.layers.{index}"
        h = norm(weights, f"{name}.layer_norm1", x)
        q, k, v = (linear(weights, f"{name}.self_attn.{site}_proj", h).view(len(x), heads, -1) for site in "qkv")
        scores = torch.einsum("qhc,khc->hqk", q, k) / math.sqrt(q.shape[-1])
        mixed = torch.einsum("hqk,khc->qhc", scores.softmax(-1), v).reshape(len(x), -1)
        x = x + linear(weights, f"{name}.self_attn.out_proj", mixed)
        h = norm(weights, f"{name}.layer_norm2", x)
        h = F.gelu(linear(weights, f"{name}.mlp.fc1", h), approximate="tanh")
        x = x + linear(weights, f"{name}.mlp.fc2", h)
    x = norm(weights, f"{root}.post_layernorm", x)
    x = linear(weights, "connector.fc2", F.gelu(linear(weights, "connector.fc1", x), approximate="tanh"))
    return x + weights["vit_pos_embed.pos_embed"][places]


def latents(weights: dict[str, Tensor], rows: Tensor, time: float) -> Tensor:
    """Latent patches with place and time."""
    tall, wide, _ = rows.shape
    places = torch.tensor([row * 64 + column for row in range(tall) for column in range(wide)])
    rate = torch.tensor([10_000 ** (-i / 128) for i in range(128)], dtype=torch.float64)
    code = torch.cat(((time * rate).cos(), (time * rate).sin()))
    code = linear(weights, "time_embedder.mlp.2", F.silu(linear(weights, "time_embedder.mlp.0", code)))
    x = linear(weights, "vae2llm", rows.reshape(-1, 64).double())
    return x + weights["latent_pos_embed.pos_embed"][places] + code


def sequence(weights: dict[str, Tensor], document: Document):
    """Rows, towers, rotary positions, splits and their kinds, token by token."""
    table = weights["language_model.model.embed_tokens.weight"]
    rows, towers, places, splits, kinds = [], [], [], [], []
    place = 0
    for split, part in enumerate(document):
        if isinstance(part, Text):
            ids = [BOS, *part.ids, EOS]
            rows += [table[token] for token in ids]
            towers += [""] * len(ids)
            places += list(range(place, place + len(ids)))
            kinds += ["causal"] * len(ids)
            place += len(ids)
        else:
            if isinstance(part, Seen):
                inner, tower, kind = vision(weights, part.patches), "", "full"
            else:
                inner = latents(weights, part.rows, part.time)
                tower, kind = "_moe_gen", "noise" if part.time > 0 else "full"
            rows += [table[BEGIN], *inner, table[END]]
            towers += ["", *[tower] * len(inner), ""]
            places += [place] * (len(inner) + 2)
            kinds += [kind] * (len(inner) + 2)
            place += 0 if kind == "noise" else 1
        splits += [split] * (len(rows) - len(splits))
    return torch.stack(rows), towers, places, splits, kinds


def may_see(q: int, k: int, splits: list[int], kinds: list[str]) -> bool:
    """One entry of the mask."""
    if kinds[k] == "noise" and splits[k] != splits[q]:
        return False
    return k <= q or (splits[k] == splits[q] and kinds[k] in ("full", "noise"))


def turned(x: Tensor, place: int) -> Tensor:
    """Rotary positions on heads ``(H, C)``."""
    half = HEAD // 2
    angle = torch.tensor([place * LLM["rope_theta"] ** (-i / half) for i in range(half)], dtype=torch.float64)
    first, second = x[:, :half], x[:, half:]
    return torch.cat((first * angle.cos() - second * angle.sin(), second * angle.cos() + first * angle.sin()), -1)


def run(weights: dict[str, Tensor], document: Document) -> tuple[Tensor, list[Tensor]]:
    """Logits ``(T, V)`` of a document, and the velocity ``(n, 64)`` at each of its latent pictures."""
    x, towers, places, splits, kinds = sequence(weights, document)
    count = len(x)
    for index in range(LLM["num_hidden_layers"]):
        name = f"language_model.model.layers.{index}"
        q, k, v = [], [], []
        for i in range(count):
            tower = towers[i]
            h = rms(weights[f"{name}.input_layernorm{tower}.weight"], x[i])
            heads = [
                linear(weights, f"{name}.self_attn.{site}_proj{tower}", h).view(-1, HEAD) for site in ("q", "k", "v")
            ]
            q.append(turned(rms(weights[f"{name}.self_attn.q_norm{tower}.weight"], heads[0]), places[i]))
            k.append(turned(rms(weights[f"{name}.self_attn.k_norm{tower}.weight"], heads[1]), places[i]))
            v.append(heads[2])
        after = []
        for i in range(count):
            seen = [j for j in range(count) if may_see(i, j, splits, kinds)]
            mixed = []
            for head in range(HEADS):
                group = head // (HEADS // KV_HEADS)
                scores = torch.stack([q[i][head] @ k[j][group] / math.sqrt(HEAD) for j in seen]).softmax(0)
                mixed.append(sum(score * v[j][group] for score, j in zip(scores, seen, strict=True)))
            tower = towers[i]
            row = x[i] + linear(weights, f"{name}.self_attn.o_proj{tower}", torch.cat(mixed))
            h = rms(weights[f"{name}.post_attention_layernorm{tower}.weight"], row)
            mlp = f"{name}.mlp{tower}"
            h = F.silu(linear(weights, f"{mlp}.gate_proj", h)) * linear(weights, f"{mlp}.up_proj", h)
            after.append(row + linear(weights, f"{mlp}.down_proj", h))
        x = torch.stack(after)
    x = torch.stack([rms(weights[f"language_model.model.norm{towers[i]}.weight"], x[i]) for i in range(count)])
    velocity, start = [], 0
    for part in document:
        if isinstance(part, Text):
            start += len(part.ids) + 2
            continue
        cells = part.patches if isinstance(part, Seen) else part.rows
        inner = cells.shape[0] * cells.shape[1]
        if isinstance(part, Latent):
            velocity.append(linear(weights, "llm2vae", x[start + 1 : start + 1 + inner]))
        start += inner + 2
    return linear(weights, "language_model.lm_head", x), velocity

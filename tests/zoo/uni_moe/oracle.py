"""The language models of Uni-MoE, token by token over the published names: from the papers and what the code does."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from omnimoe.zoo.uni_moe import published, published_2

Weights = dict[str, Tensor]
_SIZES = {"vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
TINY = published(4, **_SIZES, intermediate_size=24)
TINY_2 = published_2(
    **_SIZES,
    num_key_value_heads=2,
    dynamic_intermediate_size=40,
    shared_intermediate_size=16,
    rope_scaling={"type": "mrope", "mrope_section": [2, 1, 1]},
    bos_token_id=1,
    eos_token_id=2,
)
REAL = "dynamic_real_moe.deepspeed_moe.experts.deepspeed_experts"


def names(plain: dict) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the language model."""
    width, heads, vocab = plain["hidden_size"], plain["num_attention_heads"], plain["vocab_size"]
    kv = width // heads * plain.get("num_key_value_heads", heads)
    found = {
        "model.embed_tokens.weight": (vocab, width),
        "lm_head.weight": (vocab, width),
        "model.norm.weight": (width,),
    }
    for layer in range(plain["num_hidden_layers"]):
        at = f"model.layers.{layer}"
        found |= {f"{at}.input_layernorm.weight": (width,), f"{at}.post_attention_layernorm.weight": (width,)}
        for site, rows in (("q", width), ("k", kv), ("v", kv)):
            found[f"{at}.self_attn.{site}_proj.weight"] = (rows, width)
            if plain["model_type"] == "grin_qwen2_vl":
                found[f"{at}.self_attn.{site}_proj.bias"] = (rows,)
        found[f"{at}.self_attn.o_proj.weight"] = (width, width)
        if plain["model_type"] == "uni_moe":
            experts = {f"experts.{i}": plain["intermediate_size"] for i in range(plain["num_experts"])}
            scored = len(experts)
        else:
            experts = {
                f"{REAL}.{i}": plain["dynamic_intermediate_size"] for i in range(plain["mlp_dynamic_expert_num"])
            }
            shared = plain["mlp_fixed_expert_num"]
            experts |= {f"fixed_real_moe.{i}": plain["shared_intermediate_size"] for i in range(shared)}
            scored = len(experts) + plain["mlp_dynamic_null_expert_num"]
        found[f"{at}.mlp.gate.weight"] = (scored, width)
        for name, inner in experts.items():
            found |= {f"{at}.mlp.{name}.{half}_proj.weight": (inner, width) for half in ("gate", "up")}
            found[f"{at}.mlp.{name}.down_proj.weight"] = (width, inner)
    return found


def norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x * (x.square().mean(-1, keepdim=True) + eps).rsqrt() * weight


def network(x: Tensor, w: Weights, at: str) -> Tensor:
    inner = F.silu(w[f"{at}.gate_proj.weight"] @ x) * (w[f"{at}.up_proj.weight"] @ x)
    return w[f"{at}.down_proj.weight"] @ inner


def two_of_all(x: Tensor, w: Weights, at: str, plain: dict) -> Tensor:
    """The first Uni-MoE: the two best logits, and a softmax over them."""
    best = (w[f"{at}.gate.weight"] @ x).topk(plain["num_experts_per_tok"])
    weights = best.values.softmax(-1)
    return sum(part * network(x, w, f"{at}.experts.{int(i)}") for part, i in zip(weights, best.indices, strict=True))


def chosen_of(logits: list[float], share: float) -> list[int]:
    """The best, the second, ... up to the first that brings their softmax to the share."""
    probs, taken, total = torch.softmax(torch.tensor(logits), 0).tolist(), [], 0.0
    for place in sorted(range(len(logits)), key=lambda i: -logits[i]):
        taken.append(place)
        total += probs[place]
        if total >= share:
            break
    return taken


def dynamic(x: Tensor, w: Weights, at: str, plain: dict) -> Tensor:
    """Uni-MoE-2.0: wide experts by certainty, one of them none, and narrow ones, in one softmax.

    What falls to the wide ones together is shared out by SparseMixer: in the order of choice, each gets its part of a
    softmax over those left whose logits are within two hundredths of its own.
    """
    wide = plain["mlp_dynamic_expert_num"]
    count = wide + plain["mlp_dynamic_null_expert_num"]
    logits = w[f"{at}.gate.weight"] @ x
    values = logits.tolist()
    taken = chosen_of(values[:count], plain["mlp_dynamic_top_p"])
    left, multipliers = list(range(count)), []
    for place in taken:
        reach = 2 * plain.get("router_jitter_noise", 0.01)
        near = [
            other
            for other in left
            if (values[place] - values[other]) / max(abs(values[place]), abs(values[other])) <= reach
        ]
        multipliers.append((logits[place] - logits[near].logsumexp(0)).exp())
        left.remove(place)
    parts = torch.stack(multipliers)
    parts = parts / (parts.sum() + 1e-6)
    fixed = list(range(count, len(values)))
    joint = logits[taken + fixed].softmax(0)
    y = sum(joint[len(taken) + i] * network(x, w, f"{at}.fixed_real_moe.{i}") for i in range(len(fixed)))
    for part, place in zip(parts * joint[: len(taken)].sum(), taken, strict=True):
        if place < wide:
            y = y + part * network(x, w, f"{at}.{REAL}.{place}")
    return y


def turned(x: Tensor, positions: Tensor, plain: dict) -> Tensor:
    """``(T, H, C)`` heads, each pair ``(i, i + C/2)`` turned by the axis that its section says."""
    half = x.shape[-1] // 2
    frequency = plain.get("rope_theta", 10_000.0) ** (-torch.arange(half, dtype=x.dtype) / half)
    sections = (plain.get("rope_scaling") or {}).get("mrope_section", [half])
    axis = torch.tensor([i for i, size in enumerate(sections) for _ in range(size)])
    angle = (positions[:, axis] if positions.shape[1] > 1 else positions).to(x.dtype) * frequency
    cos, sin = angle.cos().unsqueeze(1), angle.sin().unsqueeze(1)
    first, second = x[..., :half], x[..., half:]
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


def logits_of(w: Weights, plain: dict, rows: Tensor, positions: Tensor | None = None) -> Tensor:
    """``(T, V)``, of the rows ``(T, D)`` of one sequence."""
    mixture = two_of_all if plain["model_type"] == "uni_moe" else dynamic
    heads, eps, length = plain["num_attention_heads"], plain["rms_norm_eps"], len(rows)
    positions = torch.arange(length).unsqueeze(1) if positions is None else positions
    x = rows
    for layer in range(plain["num_hidden_layers"]):
        at = f"model.layers.{layer}"
        inner = norm(x, w[f"{at}.input_layernorm.weight"], eps)
        q, k, v = (
            (inner @ w[f"{at}.self_attn.{s}_proj.weight"].T + w.get(f"{at}.self_attn.{s}_proj.bias", 0.0)).unflatten(
                1, (-1, plain["hidden_size"] // heads)
            )
            for s in "qkv"
        )
        q, k = turned(q, positions, plain), turned(k, positions, plain)
        k, v = (part.repeat_interleave(heads // part.shape[1], dim=1) for part in (k, v))
        scores = torch.einsum("qhc,khc->hqk", q, k) / q.shape[-1] ** 0.5
        scores = scores.masked_fill(torch.ones(length, length).triu(1).bool(), float("-inf"))
        mixed = torch.einsum("hqk,khc->qhc", scores.softmax(-1), v).flatten(1)
        x = x + mixed @ w[f"{at}.self_attn.o_proj.weight"].T
        inner = norm(x, w[f"{at}.post_attention_layernorm.weight"], eps)
        x = x + torch.stack([mixture(row, w, f"{at}.mlp", plain) for row in inner])
    return norm(x, w["model.norm.weight"], eps) @ w["lm_head.weight"].T

"""Qwen3, dense and mixtures of experts: a norm on the queries and keys of every head, 128 experts, eight a token.

Cosmos3's towers have the shape of Qwen3-8B.

Source: https://arxiv.org/abs/2505.09388.
"""

from __future__ import annotations

from typing import Any

from omnimoe import OmniMoeConfig, register_model
from omnimoe.zoo.card import Card
from omnimoe.zoo.qwen3.convert import QWEN3, QWEN3_MOE

CARD = Card(
    family="qwen3",
    title="Qwen3, dense and mixtures of experts: text decoders, starting points for towers",
    paper="https://arxiv.org/abs/2505.09388",
    weights={
        "qwen3_0_6b": "hf-hub:Qwen/Qwen3-0.6B",
        "qwen3_8b": "hf-hub:Qwen/Qwen3-8B",
        "qwen3_30b_a3b": "hf-hub:Qwen/Qwen3-30B-A3B",
    },
)

_SHARED: dict[str, Any] = {
    "vocab_size": 151_936,
    "head_dim": 128,
    "max_position_embeddings": 40_960,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1_000_000.0,
    "bos_token_id": 151_643,
    "eos_token_id": 151_645,
}


def qwen3(**sizes: Any) -> OmniMoeConfig:
    """Qwen3's published config at a size."""
    return QWEN3.config_of({"model_type": "qwen3", **_SHARED, **sizes})


@register_model("qwen3_0_6b")
def qwen3_0_6b() -> OmniMoeConfig:
    """Qwen3, 0.6B: a text decoder."""
    return qwen3(
        hidden_size=1024,
        intermediate_size=3072,
        num_hidden_layers=28,
        num_attention_heads=16,
        num_key_value_heads=8,
        tie_word_embeddings=True,
    )


@register_model("qwen3_8b")
def qwen3_8b() -> OmniMoeConfig:
    """Qwen3, 8B: a text decoder."""
    return qwen3(
        hidden_size=4096,
        intermediate_size=12_288,
        num_hidden_layers=36,
        num_attention_heads=32,
        num_key_value_heads=8,
        tie_word_embeddings=False,
    )


@register_model("qwen3_30b_a3b")
def qwen3_30b_a3b() -> OmniMoeConfig:
    """Qwen3-MoE, 30B: 128 experts, 8 a token."""
    return QWEN3_MOE.config_of(
        {
            "model_type": "qwen3_moe",
            **_SHARED,
            "hidden_size": 2048,
            "intermediate_size": 6144,
            "num_hidden_layers": 48,
            "num_attention_heads": 32,
            "num_key_value_heads": 4,
            "moe_intermediate_size": 768,
            "num_experts": 128,
            "num_experts_per_tok": 8,
            "norm_topk_prob": True,
            "router_aux_loss_coef": 0.001,
            "tie_word_embeddings": False,
        }
    )

"""Qwen2 and Qwen2.5, dense decoders with biases on queries, keys and values, and Qwen1.5-MoE beside them.

BAGEL grew from Qwen2.5-7B. The mixture has sixty small experts, of which a token takes four, and a shared expert behind
a gate of its own.

Sources: https://arxiv.org/abs/2407.10671; https://arxiv.org/abs/2412.15115.
"""

from __future__ import annotations

from typing import Any

from omnimoe import OmniMoeConfig, register_model
from omnimoe.zoo.card import Card
from omnimoe.zoo.qwen2.convert import QWEN2, QWEN2_MOE

CARD = Card(
    family="qwen2",
    title="Qwen2 and Qwen2.5, dense, and Qwen1.5-MoE: text decoders, starting points for towers",
    paper="https://arxiv.org/abs/2407.10671",
    related=("https://arxiv.org/abs/2412.15115",),
    weights={
        "qwen2_0_5b": "hf-hub:Qwen/Qwen2-0.5B",
        "qwen2_5_7b": "hf-hub:Qwen/Qwen2.5-7B",
        "qwen1_5_moe_a2_7b": "hf-hub:Qwen/Qwen1.5-MoE-A2.7B",
    },
    papers={"qwen2_5_7b": "https://arxiv.org/abs/2412.15115"},
    licenses={"qwen1_5_moe_a2_7b": "Tongyi Qianwen"},
)


def qwen2(**sizes: Any) -> OmniMoeConfig:
    """Qwen2's published config at a size."""
    shared = {
        "model_type": "qwen2",
        "rms_norm_eps": 1e-6,
        "rope_theta": 1_000_000.0,
        "max_position_embeddings": 131_072,
        "bos_token_id": 151_643,
        "eos_token_id": 151_643,
    }
    return QWEN2.config_of({**shared, **sizes})


@register_model("qwen2_0_5b")
def qwen2_0_5b() -> OmniMoeConfig:
    """Qwen2, 0.5B: a text decoder."""
    return qwen2(
        vocab_size=151_936,
        hidden_size=896,
        intermediate_size=4864,
        num_hidden_layers=24,
        num_attention_heads=14,
        num_key_value_heads=2,
        tie_word_embeddings=True,
    )


@register_model("qwen2_5_7b")
def qwen2_5_7b() -> OmniMoeConfig:
    """Qwen2.5, 7B: a text decoder, the seed of BAGEL's towers."""
    return qwen2(
        vocab_size=152_064,
        hidden_size=3584,
        intermediate_size=18_944,
        num_hidden_layers=28,
        num_attention_heads=28,
        num_key_value_heads=4,
        tie_word_embeddings=False,
    )


@register_model("qwen1_5_moe_a2_7b")
def qwen1_5_moe_a2_7b() -> OmniMoeConfig:
    """Qwen1.5-MoE, 14.3B: 60 experts, 4 a token, and a gated shared expert."""
    return QWEN2_MOE.config_of(
        {
            "model_type": "qwen2_moe",
            "vocab_size": 151_936,
            "hidden_size": 2048,
            "intermediate_size": 5632,
            "num_hidden_layers": 24,
            "num_attention_heads": 16,
            "num_key_value_heads": 16,
            "max_position_embeddings": 8192,
            "rms_norm_eps": 1e-6,
            "rope_theta": 1_000_000.0,
            "tie_word_embeddings": False,
            "moe_intermediate_size": 1408,
            "shared_expert_intermediate_size": 5632,
            "num_experts": 60,
            "num_experts_per_tok": 4,
            "norm_topk_prob": False,
            "router_aux_loss_coef": 0.001,
            "bos_token_id": 151_643,
            "eos_token_id": 151_643,
        }
    )

"""gpt-oss: four experts a token out of 32 or 128, with biases and a clamped gate, and every other layer short-sighted.

A learned score takes part in the softmax of each head, so that it may attend to nothing.

Source: https://arxiv.org/abs/2508.10925.
"""

from __future__ import annotations

from typing import Any

from omnimoe import OmniMoeConfig, register_model
from omnimoe.zoo.card import Card
from omnimoe.zoo.gpt_oss.convert import GPT_OSS

IN_FOUR_BITS = "its official files hold the experts in four bits (MXFP4); load a copy in bfloat16 with from_pretrained"
CARD = Card(
    family="gpt_oss",
    title="gpt-oss: mixtures of experts with biases, attention sinks, windows in every other layer",
    paper="https://arxiv.org/abs/2508.10925",
    unread=dict.fromkeys(("gpt_oss_20b", "gpt_oss_120b"), IN_FOUR_BITS),
)


def gpt_oss(**sizes: Any) -> OmniMoeConfig:
    """gpt-oss's published config at a size."""
    shared = {
        "model_type": "gpt_oss",
        "vocab_size": 201_088,
        "hidden_size": 2880,
        "intermediate_size": 2880,
        "head_dim": 64,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "num_experts_per_tok": 4,
        "sliding_window": 128,
        "max_position_embeddings": 131_072,
        "rms_norm_eps": 1e-5,
        "rope_theta": 150_000.0,
        "rope_scaling": {
            "rope_type": "yarn",
            "factor": 32.0,
            "original_max_position_embeddings": 4096,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "truncate": False,
        },
        "attention_bias": True,
        "router_aux_loss_coef": 0.9,
        "tie_word_embeddings": False,
        "pad_token_id": 199_999,
        "eos_token_id": 200_002,
    }
    return GPT_OSS.config_of({**shared, **sizes})


@register_model("gpt_oss_20b")
def gpt_oss_20b() -> OmniMoeConfig:
    """gpt-oss, 21B: 32 experts, 4 a token."""
    return gpt_oss(num_hidden_layers=24, num_local_experts=32)


@register_model("gpt_oss_120b")
def gpt_oss_120b() -> OmniMoeConfig:
    """gpt-oss, 117B: 128 experts, 4 a token."""
    return gpt_oss(num_hidden_layers=36, num_local_experts=128)

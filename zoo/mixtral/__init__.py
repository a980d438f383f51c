"""Mixtral: eight experts in every layer, two a token, their weights brought to a sum of one.

Source: https://arxiv.org/abs/2401.04088.
"""

from __future__ import annotations

from typing import Any

from omnimoe import OmniMoeConfig, register_model
from omnimoe.zoo.card import Card
from omnimoe.zoo.mixtral.convert import MIXTRAL

CARD = Card(
    family="mixtral",
    title="Mixtral: eight experts, two a token",
    paper="https://arxiv.org/abs/2401.04088",
    weights={
        "mixtral_8x7b": "hf-hub:mistralai/Mixtral-8x7B-v0.1",
        "mixtral_8x22b": "hf-hub:mistralai/Mixtral-8x22B-v0.1",
    },
)


def mixtral(**sizes: Any) -> OmniMoeConfig:
    """Mixtral's published config at a size."""
    shared = {
        "model_type": "mixtral",
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-5,
        "rope_theta": 1_000_000.0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    return MIXTRAL.config_of({**shared, **sizes})


@register_model("mixtral_8x7b")
def mixtral_8x7b() -> OmniMoeConfig:
    """Mixtral, 46.7B: 8 experts, 2 a token."""
    return mixtral(
        vocab_size=32_000,
        hidden_size=4096,
        intermediate_size=14_336,
        num_hidden_layers=32,
        num_attention_heads=32,
        max_position_embeddings=32_768,
        router_aux_loss_coef=0.02,
    )


@register_model("mixtral_8x22b")
def mixtral_8x22b() -> OmniMoeConfig:
    """Mixtral, 140.6B: 8 experts, 2 a token."""
    return mixtral(
        vocab_size=32_000,
        hidden_size=6144,
        intermediate_size=16_384,
        num_hidden_layers=56,
        num_attention_heads=48,
        max_position_embeddings=65_536,
        router_aux_loss_coef=0.001,
    )

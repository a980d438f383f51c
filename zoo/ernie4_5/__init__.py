"""ERNIE 4.5's text models, dense and mixtures of experts: what its vision-language models were grown from.

Source: ERNIE 4.5's technical report, https://ernie.baidu.com/blog/publication/ERNIE_Technical_Report.pdf.
"""

from __future__ import annotations

from typing import Any

from omnimoe import OmniMoeConfig, register_model
from omnimoe.zoo.card import Card
from omnimoe.zoo.ernie4_5.convert import ERNIE4_5, ERNIE4_5_MOE

CARD = Card(
    family="ernie4_5",
    title="ERNIE 4.5, dense and mixtures of experts: text decoders, starting points for towers",
    paper="https://ernie.baidu.com/blog/publication/ERNIE_Technical_Report.pdf",
    weights={
        "ernie4_5_0_3b": "hf-hub:baidu/ERNIE-4.5-0.3B-PT",
        "ernie4_5_21b_a3b": "hf-hub:baidu/ERNIE-4.5-21B-A3B-PT",
        "ernie4_5_300b_a47b": "hf-hub:baidu/ERNIE-4.5-300B-A47B-PT",
    },
)


SHARED: dict[str, Any] = {"vocab_size": 103_424, "max_position_embeddings": 131_072, "rms_norm_eps": 1e-5}
"""Of all sizes, those that also see among them."""
THETA = 500_000.0
"""Base of their rotary frequencies."""
SIZE_21B: dict[str, Any] = {
    "hidden_size": 2560,
    "intermediate_size": 12_288,
    "num_hidden_layers": 28,
    "num_attention_heads": 20,
    "num_key_value_heads": 4,
    "moe_num_experts": 64,
    "moe_intermediate_size": 1536,
    "moe_k": 6,
    "moe_num_shared_experts": 2,
    "tie_word_embeddings": True,
}
"""With experts for pictures beside these it is the 28B model that sees."""
SIZE_300B: dict[str, Any] = {
    "hidden_size": 8192,
    "intermediate_size": 28_672,
    "num_hidden_layers": 54,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "moe_num_experts": 64,
    "moe_intermediate_size": 3584,
    "moe_k": 8,
    "moe_num_shared_experts": 0,
    "moe_layer_start_index": 3,
    "tie_word_embeddings": False,
}
"""Likewise the 424B one."""


@register_model("ernie4_5_0_3b")
def ernie4_5_0_3b() -> OmniMoeConfig:
    """ERNIE 4.5, 0.3B: a text decoder."""
    sizes = {
        "hidden_size": 1024,
        "intermediate_size": 3072,
        "num_hidden_layers": 18,
        "num_attention_heads": 16,
        "num_key_value_heads": 2,
        "head_dim": 128,
        "tie_word_embeddings": True,
    }
    return ERNIE4_5.config_of({"model_type": "ernie4_5", "rope_theta": THETA, **SHARED, **sizes})


@register_model("ernie4_5_21b_a3b")
def ernie4_5_21b_a3b() -> OmniMoeConfig:
    """ERNIE 4.5, 21B: 64 experts, 6 a token, and two shared ones."""
    return ERNIE4_5_MOE.config_of({"model_type": "ernie4_5_moe", "rope_theta": THETA, **SHARED, **SIZE_21B})


@register_model("ernie4_5_300b_a47b")
def ernie4_5_300b_a47b() -> OmniMoeConfig:
    """ERNIE 4.5, 300B: 64 experts, 8 a token."""
    return ERNIE4_5_MOE.config_of({"model_type": "ernie4_5_moe", "rope_theta": THETA, **SHARED, **SIZE_300B})

"""ERNIE-4.5-VL: words and what is seen meet experts of their own, those for pictures a third as wide.

Attention, norms and shared experts are common to all; a router of softmax scores, moved by a bias, chooses inside the
pool of each modality. Pictures and clips of any shape enter through a vision tower, with positions in time, row and
column.

Source: ERNIE 4.5's technical report, https://ernie.baidu.com/blog/publication/ERNIE_Technical_Report.pdf.
"""

from __future__ import annotations

from typing import Any

from omnimoe import OmniMoeConfig, register_model
from omnimoe.zoo.card import Card
from omnimoe.zoo.ernie4_5_vl.convert import ERNIE4_5_VL, NESTED, SECTIONS

CARD = Card(
    family="ernie4_5_vl",
    title="ERNIE-4.5-VL: pools of experts of unequal width for words and for what is seen",
    paper="https://ernie.baidu.com/blog/publication/ERNIE_Technical_Report.pdf",
    weights={
        "ernie4_5_vl_28b_a3b": "hf-hub:baidu/ERNIE-4.5-VL-28B-A3B-PT",
        "ernie4_5_vl_424b_a47b": "hf-hub:baidu/ERNIE-4.5-VL-424B-A47B-PT",
    },
)
VISION: dict[str, Any] = {
    "depth": 32,
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "num_heads": 16,
    "patch_size": 14,
    "hidden_act": "quick_gelu",
}
"""The vision tower of all sizes."""


def ernie4_5_vl(**sizes: Any) -> OmniMoeConfig:
    """The published config at a size."""
    tied = sizes.get("tie_word_embeddings", True)
    text = {
        "vocab_size": 103_424,
        "max_position_embeddings": 131_072,
        "rms_norm_eps": 1e-5,
        "rope_parameters": {"rope_type": "default", "rope_theta": 500_000.0, "mrope_section": SECTIONS},
        **sizes,
    }
    return ERNIE4_5_VL.config_of(
        {"model_type": NESTED, "text_config": text, "vision_config": VISION, "tie_word_embeddings": tied}
    )


@register_model("ernie4_5_vl_28b_a3b")
def ernie4_5_vl_28b_a3b() -> OmniMoeConfig:
    """ERNIE-4.5-VL, 28B: 64 experts for words and 64 narrow ones for pictures, 6 a token, and two shared ones."""
    return ernie4_5_vl(
        hidden_size=2560,
        intermediate_size=12_288,
        num_hidden_layers=28,
        num_attention_heads=20,
        num_key_value_heads=4,
        moe_intermediate_size=[1536, 512],
        moe_num_experts=64,
        moe_k=6,
        moe_num_shared_experts=2,
    )


@register_model("ernie4_5_vl_424b_a47b")
def ernie4_5_vl_424b_a47b() -> OmniMoeConfig:
    """ERNIE-4.5-VL, 424B: 64 experts for words and 64 for pictures, 8 a token, no shared ones."""
    return ernie4_5_vl(
        hidden_size=8192,
        intermediate_size=28_672,
        num_hidden_layers=54,
        num_attention_heads=64,
        num_key_value_heads=8,
        moe_intermediate_size=[3584, 1536],
        moe_num_experts=64,
        moe_k=8,
        moe_num_shared_experts=0,
        mlp_layer_types=["dense"] * 3 + ["sparse"] * 51,
        tie_word_embeddings=False,
    )

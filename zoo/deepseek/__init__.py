"""DeepSeek-V3: latent attention, and from the fourth layer on 256 experts in eight groups beside a shared one.

A router's scores are sigmoids; a bias that follows the load moves the choice and not the weights.

Source: https://arxiv.org/abs/2412.19437.
"""

from __future__ import annotations

from typing import Any

from omnimoe import OmniMoeConfig, register_model
from omnimoe.zoo.card import Card
from omnimoe.zoo.deepseek.convert import DEEPSEEK_V3

CARD = Card(
    family="deepseek",
    title="DeepSeek-V3: latent attention, groups of experts, balance by a bias",
    paper="https://arxiv.org/abs/2412.19437",
    license="DeepSeek Model License",
    related=(
        "https://arxiv.org/abs/2405.04434",
        "https://arxiv.org/abs/2408.15664",
        "https://arxiv.org/abs/2502.16982",
    ),
    weights={"moonlight_16b_a3b": "hf-hub:moonshotai/Moonlight-16B-A3B"},
    papers={"moonlight_16b_a3b": "https://arxiv.org/abs/2502.16982"},
    licenses={"moonlight_16b_a3b": "MIT"},
    unread={"deepseek_v3": "its official files are in eight-bit floats; load a copy in bfloat16 with from_pretrained"},
)


def deepseek_v3_base(**sizes: Any) -> OmniMoeConfig:
    """The architecture's published config at a size."""
    shared = {
        "model_type": "deepseek_v3",
        "kv_lora_rank": 512,
        "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 64,
        "v_head_dim": 128,
        "norm_topk_prob": True,
        "tie_word_embeddings": False,
    }
    return DEEPSEEK_V3.config_of({**shared, **sizes})


@register_model("deepseek_v3")
def deepseek_v3() -> OmniMoeConfig:
    """DeepSeek-V3, 671B: 256 experts, 8 a token, and a shared one."""
    return deepseek_v3_base(
        vocab_size=129_280,
        hidden_size=7168,
        intermediate_size=18_432,
        moe_intermediate_size=2048,
        num_hidden_layers=61,
        num_attention_heads=128,
        num_key_value_heads=128,
        q_lora_rank=1536,
        n_routed_experts=256,
        n_shared_experts=1,
        num_experts_per_tok=8,
        n_group=8,
        topk_group=4,
        routed_scaling_factor=2.5,
        first_k_dense_replace=3,
        rms_norm_eps=1e-6,
        max_position_embeddings=163_840,
        rope_theta=10_000.0,
        rope_scaling={
            "type": "yarn",
            "factor": 40.0,
            "original_max_position_embeddings": 4096,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "mscale": 1.0,
            "mscale_all_dim": 1.0,
        },
        bos_token_id=0,
        eos_token_id=1,
    )


@register_model("moonlight_16b_a3b")
def moonlight_16b_a3b() -> OmniMoeConfig:
    """Moonlight, 16B: DeepSeek-V3's layers at a size of their own, 64 experts, 6 a token, and two shared ones."""
    return deepseek_v3_base(
        vocab_size=163_840,
        hidden_size=2048,
        intermediate_size=11_264,
        moe_intermediate_size=1408,
        num_hidden_layers=27,
        num_attention_heads=16,
        num_key_value_heads=16,
        q_lora_rank=None,
        n_routed_experts=64,
        n_shared_experts=2,
        num_experts_per_tok=6,
        n_group=1,
        topk_group=1,
        routed_scaling_factor=2.446,
        first_k_dense_replace=1,
        rms_norm_eps=1e-5,
        max_position_embeddings=8192,
        rope_theta=50_000.0,
        bos_token_id=163_584,
        eos_token_id=163_585,
    )

"""Uni-MoE: language models whose experts were trained apart, a modality each, and put together under one router.

What stands here is the language model alone, without its towers of pictures and sound. In the first, any token takes
two of four or eight copies of LLaMA's network. In 2.0 a token takes as many of four copies of Qwen2.5's, and of one
that gives nothing, as its router needs to be sure, beside two narrow ones that all take; how much of each, see
:class:`~omnimoe.routers.SparseMixerRouter`.

Sources: https://arxiv.org/abs/2405.11273, https://arxiv.org/abs/2511.12609.
"""

from __future__ import annotations

from typing import Any

from omnimoe import OmniMoeConfig, register_model
from omnimoe.zoo.card import Card
from omnimoe.zoo.uni_moe.convert import UNI_MOE, UNI_MOE_2

CARD = Card(
    family="uni_moe",
    title="Uni-MoE: a language model whose experts were trained apart",
    paper="https://arxiv.org/abs/2405.11273",
    license="unknown",
    papers={"uni_moe_2_omni": "https://arxiv.org/abs/2511.12609"},
    unread={
        **dict.fromkeys(
            ("uni_moe_4e", "uni_moe_8e"),
            "they are pieces: adapters of LLaMA, routers and experts in pickles; docs/uni_moe.md says what is read",
        ),
        "uni_moe_2_omni": "they hold towers and generators beside the language model, which alone is read",
    },
)


def published(experts: int, **sizes: Any) -> dict[str, Any]:
    """A ``config.json`` of the first Uni-MoE, whose language model is LLaMA.

    Args:
        experts: in each layer.
        sizes: further fields, as LLaMA's config has them.
    """
    shared = {
        "model_type": "uni_moe",
        "vocab_size": 32_000,
        "hidden_size": 4096,
        "intermediate_size": 11_008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
        "num_experts_per_tok": 2,
    }
    return {**shared, "num_experts": experts, **sizes}


def published_2(**sizes: Any) -> dict[str, Any]:
    """A ``config.json`` of Uni-MoE-2.0, whose language model is Qwen2.5-7B.

    Args:
        sizes: further fields, as the authors' ``GrinQwen2VLConfig`` has them.
    """
    shared = {
        "model_type": "grin_qwen2_vl",
        "vocab_size": 152_064,
        "hidden_size": 3584,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "max_position_embeddings": 32_768,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1_000_000.0,
        "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
        "hidden_act": "silu",
        "dynamic_intermediate_size": 18_944,
        "shared_intermediate_size": 2368,
        "mlp_dynamic_expert_num": 4,
        "mlp_dynamic_null_expert_num": 1,
        "mlp_dynamic_top_p": 0.7,
        "mlp_fixed_expert_num": 2,
        "bos_token_id": 151_643,
        "eos_token_id": 151_645,
        "tie_word_embeddings": False,
    }
    return {**shared, **sizes}


@register_model("uni_moe_4e")
def uni_moe_4e() -> OmniMoeConfig:
    """Uni-MoE's language model, 19.7B: 4 experts, 2 a token, on LLaMA 7B."""
    return UNI_MOE.config_of(published(4))


@register_model("uni_moe_8e")
def uni_moe_8e() -> OmniMoeConfig:
    """Uni-MoE's language model, 37.0B: 8 experts, 2 a token, on LLaMA 7B."""
    return UNI_MOE.config_of(published(8))


@register_model("uni_moe_2_omni")
def uni_moe_2_omni() -> OmniMoeConfig:
    """Uni-MoE-2.0's language model, 26.1B: up to 4 experts a token or none, and 2 narrow ones, on Qwen2.5 7B."""
    return UNI_MOE_2.config_of(published_2())


__all__ = ["published", "published_2"]

"""OLMoE: 64 small experts in every layer, eight a token, their weights as the softmax gives them.

Source: https://arxiv.org/abs/2409.02060.
"""

from __future__ import annotations

from omnimoe import OmniMoeConfig, register_model
from omnimoe.zoo.card import Card
from omnimoe.zoo.olmoe.convert import OLMOE

CARD = Card(
    family="olmoe",
    title="OLMoE: 64 experts, eight a token",
    paper="https://arxiv.org/abs/2409.02060",
    weights={"olmoe_1b_7b": "hf-hub:allenai/OLMoE-1B-7B-0924"},
)


@register_model("olmoe_1b_7b")
def olmoe_1b_7b() -> OmniMoeConfig:
    """OLMoE, 6.9B: 64 experts, 8 a token."""
    return OLMOE.config_of(
        {
            "model_type": "olmoe",
            "vocab_size": 50_304,
            "hidden_size": 2048,
            "intermediate_size": 1024,
            "num_hidden_layers": 16,
            "num_attention_heads": 16,
            "num_key_value_heads": 16,
            "max_position_embeddings": 4096,
            "rms_norm_eps": 1e-5,
            "rope_theta": 10_000.0,
            "num_experts": 64,
            "num_experts_per_tok": 8,
            "norm_topk_prob": False,
            "router_aux_loss_coef": 0.01,
            "tie_word_embeddings": False,
            "pad_token_id": 1,
            "eos_token_id": 50_279,
        }
    )

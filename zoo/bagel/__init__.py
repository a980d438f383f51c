"""BAGEL: a Mixture-of-Transformers whose towers are roles, one to understand and one to draw.

Text and pictures seen through a SigLIP encoder meet the first tower of every site; latents of pictures, clean or
noised, meet the second. A picture attends to itself both ways, one that is being drawn is seen by nobody else, and all
tokens of a picture share one rotary position.

Source: https://arxiv.org/abs/2505.14683.
"""

from __future__ import annotations

from omnimoe import OmniMoeConfig, register_model
from omnimoe.zoo.bagel.convert import BAGEL, LLM, PUBLISHED_VIT, VIT
from omnimoe.zoo.card import Card

CARD = Card(
    family="bagel",
    title="BAGEL: understanding and generation in two towers over Qwen2.5",
    paper="https://arxiv.org/abs/2505.14683",
    weights={"bagel_7b_mot": "hf-hub:ByteDance-Seed/BAGEL-7B-MoT"},
)


@register_model("bagel_7b_mot")
def bagel_7b_mot() -> OmniMoeConfig:
    """BAGEL, 7B active of 14B: understands and draws pictures."""
    language = {
        "model_type": "qwen2",
        "vocab_size": 152_064,
        "hidden_size": 3584,
        "intermediate_size": 18_944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "max_position_embeddings": 32_768,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1_000_000.0,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
    }
    return BAGEL.config_of({LLM: language, VIT: dict(PUBLISHED_VIT)})

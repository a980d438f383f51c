"""Llama: the dense decoder that most seeds descend from, here at the sizes of SmolLM2, whose weights are free.

Any checkpoint of type ``llama`` loads, Llama 3's rotary scaling included; a size without a name is declared by its own
``config.json``.

Sources: https://arxiv.org/abs/2302.13971; SmolLM2, https://arxiv.org/abs/2502.02737.
"""

from __future__ import annotations

from typing import Any

from omnimoe import OmniMoeConfig, register_model
from omnimoe.zoo.card import Card
from omnimoe.zoo.llama.convert import LLAMA

CARD = Card(
    family="llama",
    title="Llama: dense text decoders, starting points for towers; SmolLM2's sizes",
    paper="https://arxiv.org/abs/2502.02737",
    related=("https://arxiv.org/abs/2302.13971",),
    weights={
        "smollm2_135m": "hf-hub:HuggingFaceTB/SmolLM2-135M",
        "smollm2_360m": "hf-hub:HuggingFaceTB/SmolLM2-360M",
        "smollm2_1_7b": "hf-hub:HuggingFaceTB/SmolLM2-1.7B",
    },
)


def smollm2(**sizes: Any) -> OmniMoeConfig:
    """SmolLM2's published config at a size."""
    shared = {
        "model_type": "llama",
        "vocab_size": 49_152,
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-5,
        "rope_theta": 100_000.0,
        "tie_word_embeddings": True,
        "bos_token_id": 0,
        "eos_token_id": 0,
    }
    return LLAMA.config_of({**shared, **sizes})


@register_model("smollm2_135m")
def smollm2_135m() -> OmniMoeConfig:
    """SmolLM2, 135M: a text decoder."""
    return smollm2(
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        initializer_range=0.041666666666666664,
    )


@register_model("smollm2_360m")
def smollm2_360m() -> OmniMoeConfig:
    """SmolLM2, 360M: a text decoder."""
    return smollm2(
        hidden_size=960,
        intermediate_size=2560,
        num_hidden_layers=32,
        num_attention_heads=15,
        num_key_value_heads=5,
    )


@register_model("smollm2_1_7b")
def smollm2_1_7b() -> OmniMoeConfig:
    """SmolLM2, 1.7B: a text decoder."""
    return smollm2(
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=24,
        num_attention_heads=32,
        num_key_value_heads=32,
        rope_theta=130_000.0,
    )

"""Chameleon 7B and 34B as Meta published them: words and picture codes in one vocabulary, drawn and read by one model.

They differ from the twins in q/k norms, in where 7B has its norms, in their ids, and in the autoencoder of the picture
codes, which is a part of the model.

The ids are those of Meta's tokenizer. Of its 65,536 words only those are listed here that the model itself has to know.

Source: https://arxiv.org/abs/2405.09818.
"""

from __future__ import annotations

from typing import Any

from omnimoe import OmniMoeConfig, register_model
from omnimoe.zoo.card import Card
from omnimoe.zoo.chameleon.convert import BEGIN, BOS, CHAMELEON, END, EOS, PAD, TURN, word_of

CARD = Card(
    family="chameleon",
    title="Chameleon: words and pictures in one vocabulary, as published",
    paper="https://arxiv.org/abs/2405.09818",
    license=CHAMELEON.license,
    weights={"chameleon_7b": "hf-hub:facebook/chameleon-7b", "chameleon_34b": "hf-hub:facebook/chameleon-30b"},
)

IMAGE_CODES, FIRST_CODE = 8_192, 4


def vocabulary() -> dict[str, int]:
    """The words whose ids the model has to know."""
    codes = {word_of(code): FIRST_CODE + code for code in range(IMAGE_CODES)}
    return {BOS: 0, PAD: 1, EOS: 2, **codes, END: 8196, BEGIN: 8197, TURN: 8710, "<image>": 8711}


def published(**sizes: Any) -> OmniMoeConfig:
    """Chameleon's published config at a size."""
    shared = {
        "model_type": "chameleon",
        "vocab_size": 65_536,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10_000.0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "vocabulary_map": vocabulary(),
        "vq_config": {"resolution": 512, "num_embeddings": IMAGE_CODES},
    }
    return CHAMELEON.config_of({**shared, **sizes})


@register_model("chameleon_7b")
def chameleon_7b() -> OmniMoeConfig:
    """Chameleon, 7B, as published: words and pictures in, words and pictures out."""
    return published(
        hidden_size=4096,
        intermediate_size=11_008,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=32,
    )


@register_model("chameleon_34b")
def chameleon_34b() -> OmniMoeConfig:
    """Chameleon, 34B, as published: words and pictures in, words and pictures out."""
    return published(
        hidden_size=8192,
        intermediate_size=22_016,
        num_hidden_layers=48,
        num_attention_heads=64,
        num_key_value_heads=8,
        swin_norm=True,
        model_parallel_size=4,
    )

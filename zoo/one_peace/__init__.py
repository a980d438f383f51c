"""ONE-PEACE: attention and norms shared by text, pictures and sound, and a network for each in every layer.

Norms stand before and inside of each branch, whose sum is scaled by a learned factor a column. Each modality has an
adapter of its own: words with learned positions, patches by nested maps, sound by convolutions over the waveform; each
begins with a learned row for the whole, and scores where its rows stand to each other. Vectors compare all three.

Source: https://arxiv.org/abs/2305.11172.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from omnimoe import OmniMoeConfig, register_model
from omnimoe.zoo.card import Card
from omnimoe.zoo.one_peace.convert import BRANCHES, ONE_PEACE

CARD = Card(
    family="one_peace",
    title="ONE-PEACE: a network for text, for pictures and for sound under shared attention",
    paper="https://arxiv.org/abs/2305.11172",
    license="Apache-2.0",
)


def published(
    width: int = 1536,
    inner: int = 6144,
    layers: int = 40,
    heads: int = 24,
    *,
    branches: Sequence[str] = BRANCHES,
    image_size: int = 256,
    vocab_size: int = 50_264,
    aligned: bool = True,
) -> dict[str, Any]:
    """A ``config.json``: the section ``model.encoder`` of the authors' settings, and what stands beside it.

    Args:
        width: of the stream.
        inner: of a network.
        layers: of the encoder.
        heads: of attention.
        branches: of :data:`BRANCHES`; a checkpoint tuned for pictures and text has no ``"audio"``.
        image_size: side of a picture in pixels, 256 in pre-training.
        vocab_size: words of the authors' ``dict.txt``, with four special ones.
        aligned: whether there are maps to vectors by which modalities are compared.
    """
    adapter = {"layernorm_embedding": False, "add_type_embedding": False, "shrink_alpha": 1.0, "use_attn_bias": True}
    side = image_size // 16
    sound = {
        "feature_embed_dim": 512,
        "feature_encoder_spec": "[(512, 10, 5)] + [(512, 3, 2)] * 4 + [(512,2,2)] + [(512,2,2)]",
        "abs_pos_type": "conv",
        "conv_pos_depth": 5,
        "conv_pos_width": 95,
        "conv_pos_groups": 16,
        "conv_pos_pre_ln": False,
        "bucket_size": 512,
    }
    return {
        "model_type": "one_peace",
        "vocab_size": vocab_size,
        "patch_image_size": image_size,
        "heads": ["aligned"] if aligned else [],
        "encoder": {
            "text_adapter": {**adapter, "bucket_size": 256},
            "image_adapter": {
                **adapter,
                "bucket_size": side,
                "rel_bucket_size": side,
                "vision_encoder_type": "hmlp",
            },
            "audio_adapter": {**adapter, **sound},
            "embed_dim": width,
            "ffn_embed_dim": inner,
            "layers": layers,
            "attention_heads": heads,
            "magneto_scale_attn": True,
            "scale_attn": False,
            "scale_fc": True,
            "scale_heads": False,
            "use_layer_scale": True,
            "layer_scale_init_value": 1e-6,
            **{f"use_{branch}_moe": branch in branches for branch in BRANCHES},
        },
    }


@register_model("one_peace_4b")
def one_peace_4b() -> OmniMoeConfig:
    """ONE-PEACE, 4B: vectors of texts, pictures and sounds that can be compared."""
    return ONE_PEACE.config_of(published())


__all__ = ["BRANCHES", "published"]

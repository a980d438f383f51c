"""BEiT-3: an encoder of text and pictures whose every weight has a copy for either, and whose attention sees both.

Norms stand before and inside of each branch (sub-LN of Magneto), with biases throughout. Positions are learned, a table
a modality, and counted anew in each span. Words under a mask are predicted by a head over the vocabulary; the models
``_itc`` have instead a map for each modality, by which pictures and texts are compared.

Sources: https://arxiv.org/abs/2208.10442, https://arxiv.org/abs/2210.06423.
"""

from __future__ import annotations

from typing import Any

from omnimoe import OmniMoeConfig, register_model
from omnimoe.zoo.beit3.convert import BEIT3, HEADS
from omnimoe.zoo.card import Card

CARD = Card(
    family="beit3",
    title="BEiT-3: text and pictures through an encoder with a copy of every weight for either",
    paper="https://arxiv.org/abs/2208.10442",
    license="MIT",
    related=("https://arxiv.org/abs/2210.06423",),
)


def published(width: int, layers: int, heads: int, *, image_size: int = 224, kinds: tuple[str, ...]) -> dict[str, Any]:
    """The arguments of torchscale's encoder for a size, and which heads the weights have.

    Args:
        width: of the stream; the networks are four times as wide.
        layers: of the encoder.
        heads: of attention.
        image_size: side of a picture in pixels: 224 in pre-training, 384 or 480 after it.
        kinds: names of :data:`HEADS`.
    """
    return {
        "model_type": "beit3",
        "multiway": True,
        "vocab_size": 64_010,
        "img_size": image_size,
        "patch_size": 16,
        "encoder_embed_dim": width,
        "encoder_layers": layers,
        "encoder_attention_heads": heads,
        "encoder_ffn_embed_dim": 4 * width,
        "no_output_layer": True,
        "heads": list(kinds),
    }


@register_model("beit3_base")
def beit3_base() -> OmniMoeConfig:
    """BEiT-3 base, 271M: fills in masked words, given a picture."""
    return BEIT3.config_of(published(768, 12, 12, kinds=("words",)))


@register_model("beit3_large")
def beit3_large() -> OmniMoeConfig:
    """BEiT-3 large, 739M: fills in masked words, given a picture."""
    return BEIT3.config_of(published(1024, 24, 16, kinds=("words",)))


@register_model("beit3_base_itc")
def beit3_base_itc() -> OmniMoeConfig:
    """BEiT-3 base, 222M: finds pictures by text and texts by picture."""
    return BEIT3.config_of(published(768, 12, 12, kinds=("aligned",)))


@register_model("beit3_large_itc")
def beit3_large_itc() -> OmniMoeConfig:
    """BEiT-3 large, 675M: finds pictures by text and texts by picture."""
    return BEIT3.config_of(published(1024, 24, 16, kinds=("aligned",)))


__all__ = ["HEADS", "published"]

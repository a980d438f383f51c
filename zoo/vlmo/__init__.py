"""VLMo: attention and half of the norms shared by text and pictures, networks by modality, and, on top, for both.

In the lower layers a row meets the network of its modality. In the upper ones a sequence of one modality goes on so,
while one of text and picture together meets a third network. Where two rows stand is scored by learned tables, and each
branch is scaled by a learned factor a column.

Source: https://arxiv.org/abs/2111.02358.
"""

from __future__ import annotations

from typing import Any

from omnimoe import OmniMoeConfig, register_model
from omnimoe.zoo.card import Card
from omnimoe.zoo.vlmo.convert import HEADS, VLMO

CARD = Card(
    family="vlmo",
    title="VLMo: networks for text, for pictures, and for both, under shared attention",
    paper="https://arxiv.org/abs/2111.02358",
    license="MIT",
)


def published(
    width: int, layers: int, heads: int, joint_from: int, *, image_size: int = 224, kinds: tuple[str, ...]
) -> dict[str, Any]:
    """What a ``config.json`` says of a size, and which heads the weights have.

    Args:
        width: of the stream; the networks are four times as wide.
        layers: of the encoder.
        heads: of attention.
        joint_from: first layer with a network for text and picture together.
        image_size: side of a picture in pixels: 224 in pre-training, 384 or 480 after it.
        kinds: names of :data:`HEADS`.
    """
    return {
        "model_type": "vlmo",
        "embed_dim": width,
        "depth": layers,
        "num_heads": heads,
        "mlp_ratio": 4,
        "vlffn_start_layer_index": joint_from,
        "image_size": image_size,
        "patch_size": 16,
        "vocab_size": 30_522,
        "max_text_len": 40,
        "max_text_len_of_initckpt": 196,
        "heads": list(kinds),
    }


@register_model("vlmo_base")
def vlmo_base() -> OmniMoeConfig:
    """VLMo base, 175M without its heads: words under masks, whether pairs fit, pictures by text."""
    return VLMO.config_of(published(768, 12, 12, 10, kinds=("words", "pairs", "aligned")))


@register_model("vlmo_large")
def vlmo_large() -> OmniMoeConfig:
    """VLMo large, 562M without its heads: words under masks, whether pairs fit, pictures by text."""
    return VLMO.config_of(published(1024, 24, 16, 21, kinds=("words", "pairs", "aligned")))


__all__ = ["HEADS", "published"]

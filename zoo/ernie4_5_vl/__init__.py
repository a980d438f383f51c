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
from omnimoe.zoo.ernie4_5 import SHARED, SIZE_21B, SIZE_300B, THETA
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


def ernie4_5_vl(text: dict[str, Any], width: int) -> OmniMoeConfig:
    """The published config over a text model whose layers get as many experts for pictures.

    Args:
        text: sizes of the text model.
        width: of the networks of the experts for pictures.
    """
    sizes = dict(text)
    first, count = sizes.pop("moe_layer_start_index", 1), sizes["num_hidden_layers"]
    sizes |= {
        "moe_intermediate_size": [text["moe_intermediate_size"], width],
        "mlp_layer_types": ["dense"] * first + ["sparse"] * (count - first),
        "rope_parameters": {"rope_type": "default", "rope_theta": THETA, "mrope_section": SECTIONS},
    }
    return ERNIE4_5_VL.config_of(
        {
            "model_type": NESTED,
            "text_config": {**SHARED, **sizes},
            "vision_config": VISION,
            "tie_word_embeddings": text["tie_word_embeddings"],
        }
    )


@register_model("ernie4_5_vl_28b_a3b")
def ernie4_5_vl_28b_a3b() -> OmniMoeConfig:
    """ERNIE-4.5-VL, 28B: 64 experts for words and 64 narrow ones for pictures, 6 a token, and two shared ones."""
    return ernie4_5_vl(SIZE_21B, width=512)


@register_model("ernie4_5_vl_424b_a47b")
def ernie4_5_vl_424b_a47b() -> OmniMoeConfig:
    """ERNIE-4.5-VL, 424B: 64 experts for words and 64 for pictures, 8 a token, no shared ones."""
    return ernie4_5_vl(SIZE_300B, width=1536)

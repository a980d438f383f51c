"""Mixture-of-Transformers: every weight but embedding and head has a copy for each modality; attention is global.

A copy works on the rows of its modality alone, so a token meets as many weights as in the dense twin.

Source: https://arxiv.org/abs/2411.04996.
"""

from __future__ import annotations

from omnimoe import OmniMoeConfig, register_model
from omnimoe.zoo.card import Card
from omnimoe.zoo.chameleon import (
    chameleon_1_5b,
    chameleon_1_5b_speech,
    chameleon_7b_speech,
    chameleon_7b_twin,
    chameleon_37m,
    chameleon_37m_speech,
    chameleon_94m,
    chameleon_94m_speech,
    chameleon_443m,
    chameleon_443m_speech,
    chameleon_880m,
    chameleon_880m_speech,
)

CARD = Card(
    family="mot",
    title="Mixture-of-Transformers: attention projections, feed-forward networks and norms untied by modality",
    paper="https://arxiv.org/abs/2411.04996",
    related=("https://arxiv.org/abs/2405.09818",),
)


def untied(config: OmniMoeConfig) -> OmniMoeConfig:
    """A dense config with copies of attention projections, q/k norms, feed-forward networks and norms by modality."""
    return config.replace(
        attention=config.attention.replace(towers="modality"),
        experts=config.experts.replace(towers="modality"),
        norm=config.norm.replace(towers="modality"),
    )


@register_model("mot_37m")
def mot_37m() -> OmniMoeConfig:
    """Mixture-of-Transformers, 37M active, two towers: text and pictures."""
    return untied(chameleon_37m())


@register_model("mot_94m")
def mot_94m() -> OmniMoeConfig:
    """Mixture-of-Transformers, 94M active, two towers: text and pictures."""
    return untied(chameleon_94m())


@register_model("mot_443m")
def mot_443m() -> OmniMoeConfig:
    """Mixture-of-Transformers, 443M active, two towers: text and pictures."""
    return untied(chameleon_443m())


@register_model("mot_880m")
def mot_880m() -> OmniMoeConfig:
    """Mixture-of-Transformers, 880M active, two towers: text and pictures."""
    return untied(chameleon_880m())


@register_model("mot_1_5b")
def mot_1_5b() -> OmniMoeConfig:
    """Mixture-of-Transformers, 1.5B active, two towers: text and pictures."""
    return untied(chameleon_1_5b())


@register_model("mot_7b")
def mot_7b() -> OmniMoeConfig:
    """Mixture-of-Transformers, 7B active, two towers: text and pictures."""
    return untied(chameleon_7b_twin())


@register_model("mot_37m_speech")
def mot_37m_speech() -> OmniMoeConfig:
    """Mixture-of-Transformers, 37M active, three towers: text, pictures and speech."""
    return untied(chameleon_37m_speech())


@register_model("mot_94m_speech")
def mot_94m_speech() -> OmniMoeConfig:
    """Mixture-of-Transformers, 94M active, three towers: text, pictures and speech."""
    return untied(chameleon_94m_speech())


@register_model("mot_443m_speech")
def mot_443m_speech() -> OmniMoeConfig:
    """Mixture-of-Transformers, 443M active, three towers: text, pictures and speech."""
    return untied(chameleon_443m_speech())


@register_model("mot_880m_speech")
def mot_880m_speech() -> OmniMoeConfig:
    """Mixture-of-Transformers, 880M active, three towers: text, pictures and speech."""
    return untied(chameleon_880m_speech())


@register_model("mot_1_5b_speech")
def mot_1_5b_speech() -> OmniMoeConfig:
    """Mixture-of-Transformers, 1.5B active, three towers: text, pictures and speech."""
    return untied(chameleon_1_5b_speech())


@register_model("mot_7b_speech")
def mot_7b_speech() -> OmniMoeConfig:
    """Mixture-of-Transformers, 7B active, three towers: text, pictures and speech."""
    return untied(chameleon_7b_speech())

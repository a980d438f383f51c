"""MoMa: a group of experts for each modality; inside its group, every expert takes its best tokens.

Attention is shared. A group's only expert is a plain feed-forward network without a router (``1t1i``, and the picture
expert of ``7t1i``). Auxiliary routers, by which such a model generates, come in a second stage of training:
:func:`omnimoe.add_auxiliary_routers`. ``momad`` adds a mixture of depths: every second layer works on a quarter of the
tokens, chosen first and from all modalities, and there are more layers for the same FLOPs (experimental).

Source: https://arxiv.org/abs/2407.21770.
"""

from __future__ import annotations

from omnimoe import OmniMoeConfig, RoutedExperts, register_model
from omnimoe.backbone import LayerRange
from omnimoe.routers import ByModalityRouter, DepthRouter, ExpertChoiceRouter
from omnimoe.zoo.card import Card
from omnimoe.zoo.chameleon import chameleon_1_4b, chameleon_90m, chameleon_435m, sized

CARD = Card(
    family="moma",
    title="MoMa: experts grouped by modality, chosen by the experts inside a group",
    paper="https://arxiv.org/abs/2407.21770",
    related=("https://arxiv.org/abs/2405.09818",),
)


def modality_experts(config: OmniMoeConfig, *, text: int, image: int) -> OmniMoeConfig:
    """The feed-forward networks of a dense config as a group of experts for text and one for pictures."""
    return config.replace(
        experts=RoutedExperts.Config(
            num_experts=text + image,
            intermediate_size=config.experts.intermediate_size,
            router=ByModalityRouter.Config(
                experts=(text, image), router=ExpertChoiceRouter.Config(score="sigmoid", causal_form="none")
            ),
        )
    )


def every_second_layer(config: OmniMoeConfig) -> OmniMoeConfig:
    """A config of which every second layer, from the first, works on the best quarter of a batch."""
    return config.replace(layers=(LayerRange(step=2, depth=DepthRouter.Config(pool="batch")),))


@register_model("moma_90m_1t1i")
def moma_90m_1t1i() -> OmniMoeConfig:
    """MoMa, 90M active: one expert for text and one for pictures."""
    return modality_experts(chameleon_90m(), text=1, image=1)


@register_model("moma_90m_2t2i")
def moma_90m_2t2i() -> OmniMoeConfig:
    """MoMa, 90M active: two text and two picture experts."""
    return modality_experts(chameleon_90m(), text=2, image=2)


@register_model("moma_90m_4t4i")
def moma_90m_4t4i() -> OmniMoeConfig:
    """MoMa, 90M active: four text and four picture experts."""
    return modality_experts(chameleon_90m(), text=4, image=4)


@register_model("moma_90m_7t1i")
def moma_90m_7t1i() -> OmniMoeConfig:
    """MoMa, 90M active: seven text and one picture experts."""
    return modality_experts(chameleon_90m(), text=7, image=1)


@register_model("moma_90m_6t2i")
def moma_90m_6t2i() -> OmniMoeConfig:
    """MoMa, 90M active: six text and two picture experts."""
    return modality_experts(chameleon_90m(), text=6, image=2)


@register_model("moma_435m_1t1i")
def moma_435m_1t1i() -> OmniMoeConfig:
    """MoMa, 435M active: one expert for text and one for pictures."""
    return modality_experts(chameleon_435m(), text=1, image=1)


@register_model("moma_435m_2t2i")
def moma_435m_2t2i() -> OmniMoeConfig:
    """MoMa, 435M active: two text and two picture experts."""
    return modality_experts(chameleon_435m(), text=2, image=2)


@register_model("moma_435m_4t4i")
def moma_435m_4t4i() -> OmniMoeConfig:
    """MoMa, 435M active: four text and four picture experts."""
    return modality_experts(chameleon_435m(), text=4, image=4)


@register_model("moma_435m_7t1i")
def moma_435m_7t1i() -> OmniMoeConfig:
    """MoMa, 435M active: seven text and one picture experts."""
    return modality_experts(chameleon_435m(), text=7, image=1)


@register_model("moma_435m_6t2i")
def moma_435m_6t2i() -> OmniMoeConfig:
    """MoMa, 435M active: six text and two picture experts."""
    return modality_experts(chameleon_435m(), text=6, image=2)


@register_model("moma_1_4b_1t1i")
def moma_1_4b_1t1i() -> OmniMoeConfig:
    """MoMa, 1.4B active: one expert for text and one for pictures."""
    return modality_experts(chameleon_1_4b(), text=1, image=1)


@register_model("moma_1_4b_2t2i")
def moma_1_4b_2t2i() -> OmniMoeConfig:
    """MoMa, 1.4B active: two text and two picture experts."""
    return modality_experts(chameleon_1_4b(), text=2, image=2)


@register_model("moma_1_4b_4t4i")
def moma_1_4b_4t4i() -> OmniMoeConfig:
    """MoMa, 1.4B active: four text and four picture experts."""
    return modality_experts(chameleon_1_4b(), text=4, image=4)


@register_model("moma_1_4b_7t1i")
def moma_1_4b_7t1i() -> OmniMoeConfig:
    """MoMa, 1.4B active: seven text and one picture experts."""
    return modality_experts(chameleon_1_4b(), text=7, image=1)


@register_model("moma_1_4b_6t2i")
def moma_1_4b_6t2i() -> OmniMoeConfig:
    """MoMa, 1.4B active: six text and two picture experts."""
    return modality_experts(chameleon_1_4b(), text=6, image=2)


@register_model("momad_90m_1t1i")
def momad_90m_1t1i() -> OmniMoeConfig:
    """MoMa with a mixture of depths, 90M in FLOPs: one expert for text and one for pictures."""
    return every_second_layer(modality_experts(chameleon_90m().replace(num_layers=14), text=1, image=1))


@register_model("momad_90m_4t4i")
def momad_90m_4t4i() -> OmniMoeConfig:
    """MoMa with a mixture of depths, 90M in FLOPs: four text and four picture experts."""
    return every_second_layer(modality_experts(chameleon_90m().replace(num_layers=14), text=4, image=4))


@register_model("momad_435m_1t1i")
def momad_435m_1t1i() -> OmniMoeConfig:
    """MoMa with a mixture of depths, 435M in FLOPs: one expert for text and one for pictures."""
    return every_second_layer(modality_experts(chameleon_435m().replace(num_layers=40), text=1, image=1))


@register_model("momad_435m_4t4i")
def momad_435m_4t4i() -> OmniMoeConfig:
    """MoMa with a mixture of depths, 435M in FLOPs: four text and four picture experts."""
    return every_second_layer(modality_experts(chameleon_435m().replace(num_layers=40), text=4, image=4))


@register_model("momad_1_4b_1t1i")
def momad_1_4b_1t1i() -> OmniMoeConfig:
    """MoMa with a mixture of depths, 1.4B in FLOPs: one expert for text and one for pictures."""
    return every_second_layer(modality_experts(sized(2304, 32, 18, multiple_of=1), text=1, image=1))


@register_model("momad_1_4b_4t4i")
def momad_1_4b_4t4i() -> OmniMoeConfig:
    """MoMa with a mixture of depths, 1.4B in FLOPs: four text and four picture experts."""
    return every_second_layer(modality_experts(sized(2304, 32, 18, multiple_of=1), text=4, image=4))

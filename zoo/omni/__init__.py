"""Mixture-of-Transformers over text, pictures and speech that ship with weights or are meant to, and their twins."""

from __future__ import annotations

from omnimoe import OmniMoeConfig, register_model
from omnimoe.zoo.card import Card
from omnimoe.zoo.mot import untied
from omnimoe.zoo.nano import dense_micro, dense_nano

CARD = Card(
    family="omni",
    title="Mixture-of-Transformers over text, pictures and speech, with the package's own tokenizers",
    paper="https://arxiv.org/abs/2411.04996",
    weights={"omni_nano": "weights/omni_nano", "omni_nano_dense": "weights/omni_nano_dense"},
    papers=dict.fromkeys(("omni_nano_dense", "omni_micro_dense"), "https://arxiv.org/abs/2405.09818"),
)


@register_model("omni_nano_dense")
def omni_nano_dense() -> OmniMoeConfig:
    """The dense twin of omni_nano: one network of its layers for all modalities."""
    return dense_nano().replace(num_layers=6)


@register_model("omni_nano")
def omni_nano() -> OmniMoeConfig:
    """Mixture-of-Transformers, 3M active: reads and writes text, small pictures and one voice."""
    return untied(omni_nano_dense())


@register_model("omni_micro_dense")
def omni_micro_dense() -> OmniMoeConfig:
    """The dense twin of omni_micro: one network of its layers for all modalities."""
    return dense_micro().replace(num_layers=8)


@register_model("omni_micro")
def omni_micro() -> OmniMoeConfig:
    """Mixture-of-Transformers, 11M active: the size for human voices and captions in many languages."""
    return untied(omni_micro_dense())

"""Mixture-of-Mamba: selective state spaces whose projections have a copy for each modality, and their dense twins.

A layer is a norm, a state space and nothing else. The papers' tables count a pair of such layers, which cost what the
attention and the feed-forward network of a transformer's layer do, as one; here each is a layer of its own.

Sources: Mixture-of-Mamba, https://arxiv.org/abs/2501.16295; Mamba, https://arxiv.org/abs/2312.00752. The widths and
depths of the sizes are those of https://arxiv.org/abs/2411.04996, whose labels the counts of weights fit.
"""

from __future__ import annotations

from typing import Any

from omnimoe import NoExperts, OmniMoeConfig, StateSpace, register_model
from omnimoe.zoo.card import Card
from omnimoe.zoo.chameleon import chameleon_base, with_speech
from omnimoe.zoo.mamba.convert import MAMBA
from omnimoe.zoo.nano import nano_base
from omnimoe.zoo.transfusion import transfusion_base

PUBLISHED = {
    "mamba_130m": "hf-hub:state-spaces/mamba-130m-hf",
    "mamba_370m": "hf-hub:state-spaces/mamba-370m-hf",
    "mamba_790m": "hf-hub:state-spaces/mamba-790m-hf",
    "mamba_1_4b": "hf-hub:state-spaces/mamba-1.4b-hf",
    "mamba_2_8b": "hf-hub:state-spaces/mamba-2.8b-hf",
}
CARD = Card(
    family="mamba",
    title="Mixture-of-Mamba: state spaces whose projections are untied by modality, and Mamba",
    paper="https://arxiv.org/abs/2501.16295",
    related=("https://arxiv.org/abs/2312.00752", "https://arxiv.org/abs/2411.04996"),
    papers=dict.fromkeys(PUBLISHED, "https://arxiv.org/abs/2312.00752"),
    weights=PUBLISHED,
)


def mamba_layers(config: OmniMoeConfig, hidden_size: int, num_layers: int) -> OmniMoeConfig:
    """A config with state spaces for layers, in the place of whatever layers it has.

    Args:
        config: gives the modalities.
        hidden_size: D.
        num_layers: state spaces, one a layer.
    """
    return config.replace(
        hidden_size=hidden_size,
        num_layers=num_layers,
        attention=StateSpace.Config(),
        experts=NoExperts.Config(),
        norm_placement="pre",
        mask="causal",
        bidirectional_modalities=(),
    )


def mixture(config: OmniMoeConfig, towers: str | tuple[int, ...] = "modality", **site_towers: Any) -> OmniMoeConfig:
    """A config of state spaces with copies of the four projections by modality.

    Args:
        config: of any model whose layers are state spaces.
        towers: the copy each modality's rows meet.
        site_towers: tower maps of single projections: ``x_proj="shared"`` leaves that one out.
    """
    return config.replace(attention=config.attention.replace(towers=towers, site_towers=site_towers))


def published(**sizes: Any) -> OmniMoeConfig:
    """Mamba's published config at a size."""
    return MAMBA.config_of({"model_type": "mamba", "vocab_size": 50_280, **sizes})


@register_model("mamba_130m")
def mamba_130m() -> OmniMoeConfig:
    """Mamba, 130M: a text decoder."""
    return published(hidden_size=768, num_hidden_layers=24)


@register_model("mamba_370m")
def mamba_370m() -> OmniMoeConfig:
    """Mamba, 370M: a text decoder."""
    return published(hidden_size=1024, num_hidden_layers=48)


@register_model("mamba_790m")
def mamba_790m() -> OmniMoeConfig:
    """Mamba, 790M: a text decoder."""
    return published(hidden_size=1536, num_hidden_layers=48)


@register_model("mamba_1_4b")
def mamba_1_4b() -> OmniMoeConfig:
    """Mamba, 1.4B: a text decoder."""
    return published(hidden_size=2048, num_hidden_layers=48)


@register_model("mamba_2_8b")
def mamba_2_8b() -> OmniMoeConfig:
    """Mamba, 2.8B: a text decoder."""
    return published(hidden_size=2560, num_hidden_layers=64)


@register_model("mamba_37m")
def mamba_37m() -> OmniMoeConfig:
    """Dense state spaces, 37M: text and pictures."""
    return mamba_layers(chameleon_base(), 256, 8)


@register_model("mamba_94m")
def mamba_94m() -> OmniMoeConfig:
    """Dense state spaces, 94M: text and pictures."""
    return mamba_layers(chameleon_base(), 512, 16)


@register_model("mamba_443m")
def mamba_443m() -> OmniMoeConfig:
    """Dense state spaces, 443M: text and pictures."""
    return mamba_layers(chameleon_base(), 1024, 48)


@register_model("mamba_880m")
def mamba_880m() -> OmniMoeConfig:
    """Dense state spaces, 880M: text and pictures."""
    return mamba_layers(chameleon_base(), 1536, 48)


@register_model("mamba_1_5b")
def mamba_1_5b() -> OmniMoeConfig:
    """Dense state spaces, 1.5B: text and pictures."""
    return mamba_layers(chameleon_base(), 2048, 48)


@register_model("mixture_of_mamba_37m")
def mixture_of_mamba_37m() -> OmniMoeConfig:
    """Mixture-of-Mamba, 37M active: text and pictures."""
    return mixture(mamba_37m())


@register_model("mixture_of_mamba_94m")
def mixture_of_mamba_94m() -> OmniMoeConfig:
    """Mixture-of-Mamba, 94M active: text and pictures."""
    return mixture(mamba_94m())


@register_model("mixture_of_mamba_443m")
def mixture_of_mamba_443m() -> OmniMoeConfig:
    """Mixture-of-Mamba, 443M active: text and pictures."""
    return mixture(mamba_443m())


@register_model("mixture_of_mamba_880m")
def mixture_of_mamba_880m() -> OmniMoeConfig:
    """Mixture-of-Mamba, 880M active: text and pictures."""
    return mixture(mamba_880m())


@register_model("mixture_of_mamba_1_5b")
def mixture_of_mamba_1_5b() -> OmniMoeConfig:
    """Mixture-of-Mamba, 1.5B active: text and pictures."""
    return mixture(mamba_1_5b())


@register_model("mamba_443m_speech")
def mamba_443m_speech() -> OmniMoeConfig:
    """Dense state spaces, 443M: text, pictures and speech."""
    return with_speech(mamba_443m())


@register_model("mamba_880m_speech")
def mamba_880m_speech() -> OmniMoeConfig:
    """Dense state spaces, 880M: text, pictures and speech."""
    return with_speech(mamba_880m())


@register_model("mamba_1_5b_speech")
def mamba_1_5b_speech() -> OmniMoeConfig:
    """Dense state spaces, 1.5B: text, pictures and speech."""
    return with_speech(mamba_1_5b())


@register_model("mixture_of_mamba_443m_speech")
def mixture_of_mamba_443m_speech() -> OmniMoeConfig:
    """Mixture-of-Mamba, 443M active: text, pictures and speech."""
    return mixture(mamba_443m_speech())


@register_model("mixture_of_mamba_880m_speech")
def mixture_of_mamba_880m_speech() -> OmniMoeConfig:
    """Mixture-of-Mamba, 880M active: text, pictures and speech."""
    return mixture(mamba_880m_speech())


@register_model("mixture_of_mamba_1_5b_speech")
def mixture_of_mamba_1_5b_speech() -> OmniMoeConfig:
    """Mixture-of-Mamba, 1.5B active: text, pictures and speech."""
    return mixture(mamba_1_5b_speech())


@register_model("mamba_transfusion_163m")
def mamba_transfusion_163m() -> OmniMoeConfig:
    """Dense state spaces, 163M: text predicted, pictures denoised."""
    return mamba_layers(transfusion_base(), 768, 32)


@register_model("mamba_transfusion_760m")
def mamba_transfusion_760m() -> OmniMoeConfig:
    """Dense state spaces, 760M: text predicted, pictures denoised."""
    return mamba_layers(transfusion_base(), 1536, 48)


@register_model("mamba_transfusion_1_4b")
def mamba_transfusion_1_4b() -> OmniMoeConfig:
    """Dense state spaces, 1.4B: text predicted, pictures denoised."""
    return mamba_layers(transfusion_base(), 2048, 48)


@register_model("mixture_of_mamba_transfusion_163m")
def mixture_of_mamba_transfusion_163m() -> OmniMoeConfig:
    """Mixture-of-Mamba, 163M active: text predicted, pictures denoised."""
    return mixture(mamba_transfusion_163m())


@register_model("mixture_of_mamba_transfusion_760m")
def mixture_of_mamba_transfusion_760m() -> OmniMoeConfig:
    """Mixture-of-Mamba, 760M active: text predicted, pictures denoised."""
    return mixture(mamba_transfusion_760m())


@register_model("mixture_of_mamba_transfusion_1_4b")
def mixture_of_mamba_transfusion_1_4b() -> OmniMoeConfig:
    """Mixture-of-Mamba, 1.4B active: text predicted, pictures denoised."""
    return mixture(mamba_transfusion_1_4b())


@register_model("mamba_pico")
def mamba_pico() -> OmniMoeConfig:
    """Dense state spaces, 0.8M: every weight serves all modalities."""
    return mamba_layers(nano_base(), 96, 7)


@register_model("mixture_of_mamba_pico")
def mixture_of_mamba_pico() -> OmniMoeConfig:
    """Mixture-of-Mamba, 0.8M active: projections for each of three modalities."""
    return mixture(mamba_pico())


@register_model("mamba_nano")
def mamba_nano() -> OmniMoeConfig:
    """Dense state spaces, 3M: every weight serves all modalities."""
    return mamba_layers(nano_base(), 192, 9)


@register_model("mixture_of_mamba_nano")
def mixture_of_mamba_nano() -> OmniMoeConfig:
    """Mixture-of-Mamba, 3M active: projections for each of three modalities."""
    return mixture(mamba_nano())


@register_model("mamba_micro")
def mamba_micro() -> OmniMoeConfig:
    """Dense state spaces, 10M: every weight serves all modalities."""
    return mamba_layers(nano_base(), 320, 13)


@register_model("mixture_of_mamba_micro")
def mixture_of_mamba_micro() -> OmniMoeConfig:
    """Mixture-of-Mamba, 10M active: projections for each of three modalities."""
    return mixture(mamba_micro())


@register_model("mamba_small")
def mamba_small() -> OmniMoeConfig:
    """Dense state spaces, 28M: every weight serves all modalities; to be trained on a GPU."""
    return mamba_layers(nano_base(), 512, 15)


@register_model("mixture_of_mamba_small")
def mixture_of_mamba_small() -> OmniMoeConfig:
    """Mixture-of-Mamba, 28M active: projections for each of three modalities; to be trained on a GPU."""
    return mixture(mamba_small())

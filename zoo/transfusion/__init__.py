"""Transfusion: text is predicted token by token, pictures are latents that the same transformer denoises.

``transfusion_*`` is the dense model, ``mot_transfusion_*`` the same with a tower for each modality. Attention is causal
and, inside a picture, bidirectional. A picture is 256 patches, 2 x 2 of the 32 x 32 x 8 latent of a 256 x 256 image, so
32 numbers a patch.

Sources: https://arxiv.org/abs/2408.11039; sizes of https://arxiv.org/abs/2411.04996, table 4.
"""

from __future__ import annotations

from omnimoe import Attention, FeedForward, OmniMoeConfig, Patches, Tokens, register_model
from omnimoe.zoo.card import Card
from omnimoe.zoo.chameleon import swiglu_width
from omnimoe.zoo.mot import untied

CARD = Card(
    family="transfusion",
    title="Transfusion: next-token prediction of text and diffusion of pictures in one transformer, dense or untied",
    paper="https://arxiv.org/abs/2408.11039",
    related=("https://arxiv.org/abs/2411.04996",),
)

TEXT_TOKENS = 32_000
"""The text vocabulary; the two markers of a picture come after it."""


def transfusion_base() -> OmniMoeConfig:
    """What all sizes share: a Llama block, two modalities and the mask."""
    return OmniMoeConfig(
        modalities=(
            Tokens.Config(name="text", vocab_size=TEXT_TOKENS + 2),
            Patches.Config(
                name="image",
                channels=32,
                objective="ddpm",
                begin_id=TEXT_TOKENS,
                end_id=TEXT_TOKENS + 1,
                num_tokens=256,
                # The unknown token of a vocabulary that falls back to bytes never occurs in text.
                placeholder_id=0,
            ),
        ),
        mask="block_causal",
        bidirectional_modalities=("image",),
        max_position_embeddings=4096,
        bos_token_id=1,
        eos_token_id=2,
    )


def sized(hidden_size: int, num_layers: int, num_heads: int) -> OmniMoeConfig:
    """The base at a width, a depth and a number of heads."""
    return transfusion_base().replace(
        hidden_size=hidden_size,
        num_layers=num_layers,
        attention=Attention.Config(num_heads=num_heads),
        experts=FeedForward.Config(intermediate_size=swiglu_width(hidden_size)),
    )


@register_model("transfusion_163m")
def transfusion_163m() -> OmniMoeConfig:
    """Transfusion, dense, 163M."""
    return sized(768, 16, 12)


@register_model("transfusion_760m")
def transfusion_760m() -> OmniMoeConfig:
    """Transfusion, dense, 760M."""
    return sized(1536, 24, 24)


@register_model("transfusion_1_4b")
def transfusion_1_4b() -> OmniMoeConfig:
    """Transfusion, dense, 1.4B."""
    return sized(2048, 24, 16)


@register_model("transfusion_7b")
def transfusion_7b() -> OmniMoeConfig:
    """Transfusion, dense, 7B."""
    return sized(4096, 32, 32)


@register_model("mot_transfusion_163m")
def mot_transfusion_163m() -> OmniMoeConfig:
    """Transfusion, 163M active, with a tower for text and one for pictures."""
    return untied(transfusion_163m())


@register_model("mot_transfusion_760m")
def mot_transfusion_760m() -> OmniMoeConfig:
    """Transfusion, 760M active, with a tower for text and one for pictures."""
    return untied(transfusion_760m())


@register_model("mot_transfusion_1_4b")
def mot_transfusion_1_4b() -> OmniMoeConfig:
    """Transfusion, 1.4B active, with a tower for text and one for pictures."""
    return untied(transfusion_1_4b())


@register_model("mot_transfusion_7b")
def mot_transfusion_7b() -> OmniMoeConfig:
    """Transfusion, 7B active, with a tower for text and one for pictures."""
    return untied(transfusion_7b())

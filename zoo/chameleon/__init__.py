"""Chameleon: one dense causal transformer over text, picture codes and speech units in one vocabulary.

The models that Meta published are in :mod:`omnimoe.zoo.chameleon.published`. Here are the dense twins of ``mot``,
``moma`` and ``moe``: what those families change, they change in these configs. Norms stand on the branches ("swin
norm"), as in Chameleon-34B, Mixture-of-Transformers and MoMa.

Sources: https://arxiv.org/abs/2405.09818; sizes of https://arxiv.org/abs/2411.04996, table 1 (37M to 7B), and of
https://arxiv.org/abs/2407.21770, table 1 (90M, 435M, 1.4B).
"""

from __future__ import annotations

from omnimoe import Attention, FeedForward, OmniMoeConfig, Tokens, register_model
from omnimoe.zoo.card import Card
from omnimoe.zoo.chameleon.convert import CHAMELEON
from omnimoe.zoo.chameleon.published import chameleon_7b, chameleon_34b

CARD = Card(
    family="chameleon",
    title="Chameleon: dense early fusion over one vocabulary, the twin that sparse families are compared with",
    paper="https://arxiv.org/abs/2405.09818",
    related=("https://arxiv.org/abs/2411.04996", "https://arxiv.org/abs/2407.21770"),
)

VOCAB_SIZE = 65_536
"""Rows of the one vocabulary, markers and codes included."""
IMAGE_CODES = 8_192
"""Codebook of the picture tokenizer."""
IMAGE_TOKENS = 1_024
"""Codes of a 512 x 512 picture."""
SPEECH_CODES = 500
"""Discrete speech units, in the setting with three modalities."""


def swiglu_width(hidden_size: int, multiple_of: int = 256) -> int:
    """Two thirds of four times the width, rounded up to a multiple.

    Example:
        >>> swiglu_width(256), swiglu_width(4096), swiglu_width(512, multiple_of=1)
        (768, 11008, 1365)
    """
    return -(-int(8 * hidden_size / 3) // multiple_of) * multiple_of


def chameleon_base() -> OmniMoeConfig:
    """What all sizes share; the ids of markers are our own choice, since the papers give none."""
    return OmniMoeConfig(
        modalities=(
            Tokens.Config(name="text", vocab_size=VOCAB_SIZE - IMAGE_CODES),
            Tokens.Config(name="image", vocab_size=IMAGE_CODES, begin_id=3, end_id=4, num_tokens=IMAGE_TOKENS),
        ),
        norm_placement="post",
        max_position_embeddings=4096,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )


def sized(hidden_size: int, num_layers: int, num_heads: int, *, multiple_of: int = 256) -> OmniMoeConfig:
    """The base at a width, a depth and a number of heads."""
    return chameleon_base().replace(
        hidden_size=hidden_size,
        num_layers=num_layers,
        attention=Attention.Config(num_heads=num_heads, qk_norm="rms"),
        experts=FeedForward.Config(intermediate_size=swiglu_width(hidden_size, multiple_of)),
    )


def with_speech(config: OmniMoeConfig) -> OmniMoeConfig:
    """The same model with speech units as a third modality; its rows are taken from the end of the text range."""
    text, image = config.modalities
    speech = Tokens.Config(name="speech", vocab_size=SPEECH_CODES, begin_id=5, end_id=6)
    return config.replace(modalities=(text.replace(vocab_size=text.vocab_size - SPEECH_CODES), image, speech))


@register_model("chameleon_37m")
def chameleon_37m() -> OmniMoeConfig:
    """Dense, 37M: text and pictures."""
    return sized(256, 4, 8)


@register_model("chameleon_94m")
def chameleon_94m() -> OmniMoeConfig:
    """Dense, 94M: text and pictures."""
    return sized(512, 8, 8)


@register_model("chameleon_443m")
def chameleon_443m() -> OmniMoeConfig:
    """Dense, 443M: text and pictures."""
    return sized(1024, 24, 16)


@register_model("chameleon_880m")
def chameleon_880m() -> OmniMoeConfig:
    """Dense, 880M: text and pictures."""
    return sized(1536, 24, 24)


@register_model("chameleon_1_5b")
def chameleon_1_5b() -> OmniMoeConfig:
    """Dense, 1.5B: text and pictures."""
    return sized(2048, 24, 16)


@register_model("chameleon_7b.twin")
def chameleon_7b_twin() -> OmniMoeConfig:
    """Dense, 7B: text and pictures; the twin of the other families' 7B, not the model that was published."""
    return sized(4096, 32, 32)


@register_model("chameleon_37m_speech")
def chameleon_37m_speech() -> OmniMoeConfig:
    """Dense, 37M: text, pictures and speech."""
    return with_speech(chameleon_37m())


@register_model("chameleon_94m_speech")
def chameleon_94m_speech() -> OmniMoeConfig:
    """Dense, 94M: text, pictures and speech."""
    return with_speech(chameleon_94m())


@register_model("chameleon_443m_speech")
def chameleon_443m_speech() -> OmniMoeConfig:
    """Dense, 443M: text, pictures and speech."""
    return with_speech(chameleon_443m())


@register_model("chameleon_880m_speech")
def chameleon_880m_speech() -> OmniMoeConfig:
    """Dense, 880M: text, pictures and speech."""
    return with_speech(chameleon_880m())


@register_model("chameleon_1_5b_speech")
def chameleon_1_5b_speech() -> OmniMoeConfig:
    """Dense, 1.5B: text, pictures and speech."""
    return with_speech(chameleon_1_5b())


@register_model("chameleon_7b_speech")
def chameleon_7b_speech() -> OmniMoeConfig:
    """Dense, 7B: text, pictures and speech."""
    return with_speech(chameleon_7b_twin())


@register_model("chameleon_90m")
def chameleon_90m() -> OmniMoeConfig:
    """Dense, 90M, the baseline of MoMa, whose sizes imply a feed-forward width that is not rounded."""
    return sized(512, 8, 8, multiple_of=1)


@register_model("chameleon_435m")
def chameleon_435m() -> OmniMoeConfig:
    """Dense, 435M, the baseline of MoMa, whose sizes imply a feed-forward width that is not rounded."""
    return sized(1024, 24, 16, multiple_of=1)


@register_model("chameleon_1_4b")
def chameleon_1_4b() -> OmniMoeConfig:
    """Dense, 1.4B, the baseline of MoMa, whose sizes imply a feed-forward width that is not rounded."""
    return sized(2048, 24, 16, multiple_of=1)


__all__ = ["CHAMELEON", "chameleon_7b", "chameleon_34b"]

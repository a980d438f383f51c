"""Small models of our own over text, pictures and speech: four architectures at one count of active weights.

They are made for our tokenizers, train in minutes on a CPU (``small`` is for a GPU), and all generate: no router looks
at a later token. Every token choice takes two experts of half the width. With one expert of full width, the norm after
the experts ("swin norm") would divide its gate away, and routers would learn from the balance loss alone.
"""

from __future__ import annotations

from omnimoe import Attention, FeedForward, OmniMoeConfig, RoutedExperts, Tokens, register_model
from omnimoe.routers import ByModalityRouter, TopKRouter
from omnimoe.zoo.card import Card
from omnimoe.zoo.mot import untied

CARD = Card(
    family="nano",
    title="Dense, MoT, MoMa and MoE at 1, 3, 10 and 28 million active parameters, over text, pictures and speech",
    paper="https://arxiv.org/abs/2411.04996",
    papers={
        **dict.fromkeys(("dense_pico", "dense_nano", "dense_micro", "dense_small"), "https://arxiv.org/abs/2405.09818"),
        **dict.fromkeys(("moma_pico", "moma_nano", "moma_micro", "moma_small"), "https://arxiv.org/abs/2407.21770"),
        **dict.fromkeys(("moe_pico", "moe_nano", "moe_micro", "moe_small"), "https://arxiv.org/abs/2401.04088"),
    },
)

TEXT_SIZE = 2_048
"""Rows of the text tokenizer ``text``, special tokens included."""
IMAGE_SIZE = 1_000
"""Codes of the tokenizer ``picture``."""
IMAGE_TOKENS = 64
"""Codes of a picture, 8 x 8."""
SPEECH_SIZE = 1_000
"""Units of the tokenizer ``speech``."""
SPECIAL_TOKENS = ("<pad>", "<bos>", "<eos>", "<image>", "</image>", "<speech>", "</speech>")
"""The first rows of the text range, in order."""


def nano_base() -> OmniMoeConfig:
    """What all models share: the vocabulary, tied embeddings, norms on the branches."""
    special = SPECIAL_TOKENS.index
    return OmniMoeConfig(
        modalities=(
            Tokens.Config(name="text", vocab_size=TEXT_SIZE),
            Tokens.Config(
                name="image",
                vocab_size=IMAGE_SIZE,
                begin_id=special("<image>"),
                end_id=special("</image>"),
                num_tokens=IMAGE_TOKENS,
            ),
            Tokens.Config(
                name="speech", vocab_size=SPEECH_SIZE, begin_id=special("<speech>"), end_id=special("</speech>")
            ),
        ),
        norm_placement="post",
        tie_word_embeddings=True,
        max_position_embeddings=1024,
        pad_token_id=special("<pad>"),
        bos_token_id=special("<bos>"),
        eos_token_id=special("<eos>"),
    )


def modality_experts(config: OmniMoeConfig, experts: tuple[int, ...] = (4, 4, 4)) -> OmniMoeConfig:
    """A dense config with a group of half-width experts for each modality; a token takes two of its group."""
    return config.replace(
        experts=RoutedExperts.Config(
            num_experts=sum(experts),
            intermediate_size=config.experts.intermediate_size // 2,
            router=ByModalityRouter.Config(experts=experts, router=TopKRouter.Config(top_k=2)),
        )
    )


def token_choice(config: OmniMoeConfig, num_experts: int = 8) -> OmniMoeConfig:
    """A dense config with half-width experts for all modalities; a token takes two."""
    return config.replace(
        experts=RoutedExperts.Config(
            num_experts=num_experts,
            intermediate_size=config.experts.intermediate_size // 2,
            router=TopKRouter.Config(top_k=2),
        )
    )


@register_model("dense_pico")
def dense_pico() -> OmniMoeConfig:
    """Dense, 0.8M: every weight serves all modalities."""
    return nano_base().replace(
        hidden_size=96,
        num_layers=4,
        attention=Attention.Config(num_heads=3, qk_norm="rms"),
        experts=FeedForward.Config(intermediate_size=256),
    )


@register_model("mot_pico")
def mot_pico() -> OmniMoeConfig:
    """Mixture-of-Transformers, 0.8M active: a tower for each of three modalities."""
    return untied(dense_pico())


@register_model("moma_pico")
def moma_pico() -> OmniMoeConfig:
    """MoMa with token choice, 0.8M active: two of four half-width experts of the token's modality."""
    return modality_experts(dense_pico())


@register_model("moe_pico")
def moe_pico() -> OmniMoeConfig:
    """Mixture of experts, 0.8M active: two of eight half-width experts, whatever the modality."""
    return token_choice(dense_pico())


@register_model("dense_nano")
def dense_nano() -> OmniMoeConfig:
    """Dense, 3M: every weight serves all modalities."""
    return nano_base().replace(
        hidden_size=192,
        num_layers=5,
        attention=Attention.Config(num_heads=6, qk_norm="rms"),
        experts=FeedForward.Config(intermediate_size=512),
    )


@register_model("mot_nano")
def mot_nano() -> OmniMoeConfig:
    """Mixture-of-Transformers, 3M active: a tower for each of three modalities."""
    return untied(dense_nano())


@register_model("moma_nano")
def moma_nano() -> OmniMoeConfig:
    """MoMa with token choice, 3M active: two of four half-width experts of the token's modality."""
    return modality_experts(dense_nano())


@register_model("moe_nano")
def moe_nano() -> OmniMoeConfig:
    """Mixture of experts, 3M active: two of eight half-width experts, whatever the modality."""
    return token_choice(dense_nano())


@register_model("dense_micro")
def dense_micro() -> OmniMoeConfig:
    """Dense, 10M: every weight serves all modalities."""
    return nano_base().replace(
        hidden_size=320,
        num_layers=7,
        attention=Attention.Config(num_heads=10, qk_norm="rms"),
        experts=FeedForward.Config(intermediate_size=896),
    )


@register_model("mot_micro")
def mot_micro() -> OmniMoeConfig:
    """Mixture-of-Transformers, 10M active: a tower for each of three modalities."""
    return untied(dense_micro())


@register_model("moma_micro")
def moma_micro() -> OmniMoeConfig:
    """MoMa with token choice, 10M active: two of four half-width experts of the token's modality."""
    return modality_experts(dense_micro())


@register_model("moe_micro")
def moe_micro() -> OmniMoeConfig:
    """Mixture of experts, 10M active: two of eight half-width experts, whatever the modality."""
    return token_choice(dense_micro())


@register_model("dense_small")
def dense_small() -> OmniMoeConfig:
    """Dense, 28M: every weight serves all modalities; to be trained on a GPU."""
    return nano_base().replace(
        hidden_size=512,
        num_layers=8,
        attention=Attention.Config(num_heads=8, qk_norm="rms"),
        experts=FeedForward.Config(intermediate_size=1408),
    )


@register_model("mot_small")
def mot_small() -> OmniMoeConfig:
    """Mixture-of-Transformers, 28M active: a tower for each of three modalities; to be trained on a GPU."""
    return untied(dense_small())


@register_model("moma_small")
def moma_small() -> OmniMoeConfig:
    """MoMa with token choice, 28M active: two of four half-width experts of the token's modality."""
    return modality_experts(dense_small())


@register_model("moe_small")
def moe_small() -> OmniMoeConfig:
    """Mixture of experts, 28M active: two of eight half-width experts, whatever the modality."""
    return token_choice(dense_small())

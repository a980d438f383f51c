"""Mixture-of-experts baselines whose routers do not know modalities: every expert takes its best tokens.

``moe_*_8x`` is MoMa's baseline of eight experts with sigmoid scores, ``moe4x_*`` the baseline of
Mixture-of-Transformers with four, which names expert choice and no score function: softmax, as its source has it.

Sources: https://arxiv.org/abs/2202.09368, https://arxiv.org/abs/2407.21770, https://arxiv.org/abs/2411.04996.
"""

from __future__ import annotations

from omnimoe import OmniMoeConfig, RoutedExperts, register_model
from omnimoe.routers import ExpertChoiceRouter
from omnimoe.zoo.card import Card
from omnimoe.zoo.chameleon import (
    chameleon_1_4b,
    chameleon_1_5b,
    chameleon_7b_twin,
    chameleon_37m,
    chameleon_90m,
    chameleon_94m,
    chameleon_435m,
    chameleon_443m,
    chameleon_880m,
)

CARD = Card(
    family="moe",
    title="Mixture of experts by expert choice over all tokens, whatever their modality",
    paper="https://arxiv.org/abs/2202.09368",
    related=("https://arxiv.org/abs/2407.21770", "https://arxiv.org/abs/2411.04996"),
)


def expert_choice(config: OmniMoeConfig, num_experts: int, score: str) -> OmniMoeConfig:
    """The feed-forward networks of a dense config as experts that choose, one a token on average."""
    return config.replace(
        experts=RoutedExperts.Config(
            num_experts=num_experts,
            intermediate_size=config.experts.intermediate_size,
            router=ExpertChoiceRouter.Config(score=score),
        )
    )


@register_model("moe_90m_8x")
def moe_90m_8x() -> OmniMoeConfig:
    """Eight experts of 90M, each taking the eighth of all tokens that it scores highest."""
    return expert_choice(chameleon_90m(), 8, "sigmoid")


@register_model("moe_435m_8x")
def moe_435m_8x() -> OmniMoeConfig:
    """Eight experts of 435M, each taking the eighth of all tokens that it scores highest."""
    return expert_choice(chameleon_435m(), 8, "sigmoid")


@register_model("moe_1_4b_8x")
def moe_1_4b_8x() -> OmniMoeConfig:
    """Eight experts of 1.4B, each taking the eighth of all tokens that it scores highest."""
    return expert_choice(chameleon_1_4b(), 8, "sigmoid")


@register_model("moe4x_37m")
def moe4x_37m() -> OmniMoeConfig:
    """Four experts of 37M, each taking the quarter of all tokens that it scores highest."""
    return expert_choice(chameleon_37m(), 4, "softmax")


@register_model("moe4x_94m")
def moe4x_94m() -> OmniMoeConfig:
    """Four experts of 94M, each taking the quarter of all tokens that it scores highest."""
    return expert_choice(chameleon_94m(), 4, "softmax")


@register_model("moe4x_443m")
def moe4x_443m() -> OmniMoeConfig:
    """Four experts of 443M, each taking the quarter of all tokens that it scores highest."""
    return expert_choice(chameleon_443m(), 4, "softmax")


@register_model("moe4x_880m")
def moe4x_880m() -> OmniMoeConfig:
    """Four experts of 880M, each taking the quarter of all tokens that it scores highest."""
    return expert_choice(chameleon_880m(), 4, "softmax")


@register_model("moe4x_1_5b")
def moe4x_1_5b() -> OmniMoeConfig:
    """Four experts of 1.5B, each taking the quarter of all tokens that it scores highest."""
    return expert_choice(chameleon_1_5b(), 4, "softmax")


@register_model("moe4x_7b")
def moe4x_7b() -> OmniMoeConfig:
    """Four experts of 7B, each taking the quarter of all tokens that it scores highest."""
    return expert_choice(chameleon_7b_twin(), 4, "softmax")

"""The architectures of a comparison: variants of the small dense models, at their cost a token, over one vocabulary.

Beside ``dense``, ``mot``, ``moma`` and ``moe`` of :mod:`omnimoe.zoo.nano` and the state spaces of
:mod:`omnimoe.zoo.mamba`, at the same sizes. What chooses among rows has a causal form by a running cut-off, with a
short memory since runs here are short; a mixture of depths has none.

Sources: towers, https://arxiv.org/abs/2411.04996; experts that choose, https://arxiv.org/abs/2407.21770 and
https://arxiv.org/abs/2202.09368.
"""

from __future__ import annotations

from collections.abc import Callable

from omnimoe import OmniMoeConfig, RoutedExperts, register_model
from omnimoe.backbone import LayerRange
from omnimoe.routers import ByModalityRouter, DepthRouter, ExpertChoiceRouter
from omnimoe.zoo.card import Card
from omnimoe.zoo.mot import untied
from omnimoe.zoo.nano import dense_micro, dense_nano, dense_pico, dense_small

SIZES = {"pico": dense_pico, "nano": dense_nano, "micro": dense_micro, "small": dense_small}
"""The dense model of each size."""
DEPTHS = {"pico": (7, 288), "nano": (8, 544), "micro": (12, 816), "small": (14, 1248)}
"""Layers and width of experts with which a mixture of depths costs what the dense model does."""


def choosing(score: str) -> ExpertChoiceRouter.Config:
    """Experts that take their best rows, one a row on average."""
    return ExpertChoiceRouter.Config(score=score, cutoff_momentum=0.9)


def towers(config: OmniMoeConfig, of_keys: tuple[int, ...]) -> OmniMoeConfig:
    """A dense config with towers that several modalities may share."""
    return config.replace(
        attention=config.attention.replace(towers=of_keys),
        experts=config.experts.replace(towers=of_keys),
        norm=config.norm.replace(towers=of_keys),
    )


def text_alone(config: OmniMoeConfig) -> OmniMoeConfig:
    """Mixture-of-Transformers, a tower for text and one for pictures and speech."""
    return towers(config, (0, 1, 1))


def image_alone(config: OmniMoeConfig) -> OmniMoeConfig:
    """Mixture-of-Transformers, a tower for pictures and one for text and speech."""
    return towers(config, (0, 1, 0))


def speech_alone(config: OmniMoeConfig) -> OmniMoeConfig:
    """Mixture-of-Transformers, a tower for speech and one for text and pictures."""
    return towers(config, (0, 0, 1))


def networks_alone(config: OmniMoeConfig) -> OmniMoeConfig:
    """Mixture-of-Transformers, the feed-forward networks alone untied."""
    return config.replace(experts=config.experts.replace(towers="modality"))


def matrices_alone(config: OmniMoeConfig) -> OmniMoeConfig:
    """Mixture-of-Transformers, feed-forward networks and attention untied, all norms shared."""
    attention = config.attention.replace(towers="modality", site_towers={"qk_norm": "shared"})
    return networks_alone(config).replace(attention=attention)


def routed(config: OmniMoeConfig, *experts: int, score: str = "sigmoid") -> OmniMoeConfig:
    """A config with experts of full width that choose, in a group for all modalities or in one for each."""
    router = choosing(score)
    return config.replace(
        experts=RoutedExperts.Config(
            num_experts=sum(experts),
            intermediate_size=config.experts.intermediate_size,
            router=router if len(experts) == 1 else ByModalityRouter.Config(experts=experts, router=router),
        )
    )


def blind_4(config: OmniMoeConfig) -> OmniMoeConfig:
    """Mixture of four experts that choose among all tokens, the baseline of Mixture-of-Transformers."""
    return routed(config, 4, score="softmax")


def blind_12(config: OmniMoeConfig) -> OmniMoeConfig:
    """Mixture of twelve experts that choose among all tokens, as many as MoMa has in three groups of four."""
    return routed(config, 12)


def groups_of_1(config: OmniMoeConfig) -> OmniMoeConfig:
    """MoMa, one expert for each modality."""
    return routed(config, 1, 1, 1)


def groups_of_2(config: OmniMoeConfig) -> OmniMoeConfig:
    """MoMa, two experts for each modality, which choose."""
    return routed(config, 2, 2, 2)


def groups_of_4(config: OmniMoeConfig) -> OmniMoeConfig:
    """MoMa, four experts for each modality, which choose."""
    return routed(config, 4, 4, 4)


def hybrid(config: OmniMoeConfig) -> OmniMoeConfig:
    """Mixture-of-Transformers whose text tower has four experts that choose."""
    return untied(config).replace(experts=routed(config, 4, 1, 1, score="softmax").experts)


def shallow(config: OmniMoeConfig, num_layers: int, intermediate_size: int) -> OmniMoeConfig:
    """MoMa of more layers, every second of which works on a quarter of the tokens (experimental)."""
    config = groups_of_4(config)
    return config.replace(
        num_layers=num_layers,
        experts=config.experts.replace(intermediate_size=intermediate_size),
        layers=(LayerRange(step=2, depth=DepthRouter.Config(pool="batch")),),
    )


VARIANTS: dict[str, Callable[[OmniMoeConfig], OmniMoeConfig]] = {
    "mot_text_alone": text_alone,
    "mot_image_alone": image_alone,
    "mot_speech_alone": speech_alone,
    "mot_networks": networks_alone,
    "mot_matrices": matrices_alone,
    "mot_moe": hybrid,
    "moma_1t1i1s": groups_of_1,
    "moma_2t2i2s": groups_of_2,
    "moma_4t4i4s": groups_of_4,
    "moe4x": blind_4,
    "moe12x": blind_12,
}
"""Name to what it makes of a dense config, but for the mixture of depths."""


def declare(variant: str, size: str) -> None:
    """Registers a variant at a size."""
    dense = SIZES[size]

    def config() -> OmniMoeConfig:
        return shallow(dense(), *DEPTHS[size]) if variant == "momad_4t4i4s" else VARIANTS[variant](dense())

    told = shallow if variant == "momad_4t4i4s" else VARIANTS[variant]
    config.__doc__ = f"{(told.__doc__ or '').strip().removesuffix('.')}; {size}."
    register_model(f"{variant}_{size}")(config)


for _size in SIZES:
    for _variant in (*VARIANTS, "momad_4t4i4s"):
        declare(_variant, _size)

CARD = Card(
    family="compared",
    title="Towers, modality experts, mixtures of experts and of depths at the cost of one dense model",
    paper="https://arxiv.org/abs/2411.04996",
    papers={
        f"{name}_{size}": "https://arxiv.org/abs/2407.21770"
        for name in (*VARIANTS, "momad_4t4i4s")
        for size in SIZES
        if name.startswith("moma")
    },
)

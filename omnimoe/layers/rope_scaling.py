"""Scalings of rotary frequencies, with which a model reads longer sequences than it was first trained on.

Each takes the plain frequencies of a head to those of the model and gives the factor of the cosines and sines. Scalings
that depend on the length of the sequence (``dynamic``, ``longrope``) are not here: a cache would hold keys that were
turned by other frequencies.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from omnimoe.config import Config as ConfigBase
from omnimoe.config import ConfigError, Configurable, register
from omnimoe.registry import Registry

ROPE_SCALINGS: Registry = Registry("rope scaling")


def register_rope_scaling(name: str, *, exist_ok: bool = False):
    """Decorator that files a :class:`RopeScaling` class under ``name``."""
    return register(ROPE_SCALINGS, name, exist_ok=exist_ok)


class RopeScaling(Configurable):
    """Changes the frequencies of a head.

    Contract: ``__init__(config)``, ``frequencies(plain (C/2,), theta) -> (C/2,)``, and :attr:`factor`.
    """

    registry: ClassVar[Registry] = ROPE_SCALINGS

    @dataclass(frozen=True, kw_only=True)
    class Config(ConfigBase):
        """What all scalings have."""

        factor: float = 1.0
        """Longer sequences by that factor."""

        def __post_init__(self) -> None:
            super().__post_init__()
            if not 0 < self.factor < math.inf:
                raise ConfigError(f"factor must be a positive number, got {self.factor}")

    def __init__(self, config: RopeScaling.Config) -> None:
        self.config = config

    @property
    def factor(self) -> float:
        """What cosines and sines are multiplied by."""
        return 1.0

    def frequencies(self, plain: Tensor, theta: float) -> Tensor:
        """The frequencies of the model.

        Args:
            plain: ``(C/2,)`` float32, ``theta ** -(2 i / C)``.
            theta: their base.
        """
        raise NotImplementedError


@register_rope_scaling("linear")
class LinearScaling(RopeScaling):
    """All frequencies divided by the factor: positions are squeezed together.

    Source: https://arxiv.org/abs/2306.15595.
    """

    def frequencies(self, plain: Tensor, theta: float) -> Tensor:
        """See :class:`RopeScaling`."""
        return plain / self.config.factor


@register_rope_scaling("llama3")
class Llama3Scaling(RopeScaling):
    """Long waves divided by the factor, short ones left, a smooth passage between: Llama 3.1.

    Source: https://arxiv.org/abs/2407.21783.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config(RopeScaling.Config):
        """Llama 3.1."""

        low_freq_factor: float = 1.0
        """A wave is long if fewer than that many fit into the first context."""
        high_freq_factor: float = 4.0
        """A wave is short if more than that many fit."""
        original_length: int = 8192
        """Length of the first context."""

    config: Llama3Scaling.Config

    def frequencies(self, plain: Tensor, theta: float) -> Tensor:
        """See :class:`RopeScaling`."""
        config = self.config
        waves = config.original_length / (2 * math.pi / plain)
        share = (waves - config.low_freq_factor) / (config.high_freq_factor - config.low_freq_factor)
        smooth = (1 - share) * plain / config.factor + share * plain
        return torch.where(
            waves < config.low_freq_factor,
            plain / config.factor,
            torch.where(waves > config.high_freq_factor, plain, smooth),
        )


@register_rope_scaling("yarn")
class YarnScaling(RopeScaling):
    """Long waves divided by the factor, short ones left, a linear passage by pair; attention made sharper.

    Source: https://arxiv.org/abs/2309.00071.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config(RopeScaling.Config):
        """YaRN."""

        original_length: int = 4096
        """Length of the first context."""
        beta_fast: float = 32.0
        """Pairs that turn more often than that in the first context are left."""
        beta_slow: float = 1.0
        """Pairs that turn less often are divided by the factor."""
        truncate: bool = True
        """Round the ends of the passage outwards to whole pairs."""
        attention_factor: float | None = None
        """What cosines and sines are multiplied by; 0.1 ln(factor) + 1 where None."""

    config: YarnScaling.Config

    @property
    def factor(self) -> float:
        """What cosines and sines are multiplied by."""
        told = self.config.attention_factor
        return yarn_sharpness(self.config.factor) if told is None else told

    def frequencies(self, plain: Tensor, theta: float) -> Tensor:
        """See :class:`RopeScaling`."""
        config, pairs = self.config, len(plain)

        def pair_that_turns(times: float) -> float:
            return pairs * math.log(config.original_length / (times * 2 * math.pi)) / math.log(theta)

        low, high = pair_that_turns(config.beta_fast), pair_that_turns(config.beta_slow)
        if config.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, 2 * pairs - 1)
        width = high - low or 0.001
        slow = ((torch.arange(pairs, dtype=torch.float32, device=plain.device) - low) / width).clamp(0, 1)
        return plain / config.factor * slow + plain * (1 - slow)


def yarn_sharpness(factor: float, strength: float = 1.0) -> float:
    """YaRN's factor for attention, ``0.1 strength ln(factor) + 1``; 1 where nothing is stretched.

    Example:
        >>> yarn_sharpness(1.0), round(yarn_sharpness(40.0), 4)
        (1.0, 1.3689)
    """
    return 1.0 if factor <= 1 else 0.1 * strength * math.log(factor) + 1.0

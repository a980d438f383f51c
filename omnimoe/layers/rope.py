"""Rotary positions in one, two or three axes.

With several axes the frequencies of a head are dealt out in contiguous sections: the first section turns with the
first axis (time), the next with the second (height), the last with the third (width), as in Qwen2-VL. Or they are dealt
out in turn, one to each axis, as in Qwen3-VL.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from omnimoe.config import Config as ConfigBase
from omnimoe.config import ConfigError, Configurable
from omnimoe.layers.rope_scaling import RopeScaling
from omnimoe.ops import rope


class Rope(Configurable):
    """Turns positions into the rotary table of a head.

    Source: https://arxiv.org/abs/2104.09864; several axes, https://arxiv.org/abs/2409.12191.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config(ConfigBase):
        """Rotary positions."""

        theta: float = 10_000.0
        """Base of the frequencies."""
        sections: tuple[int, ...] = ()
        """Frequencies of each axis, summing to half the head dimension; empty for a single axis."""
        axes: tuple[int, ...] = ()
        """The axis of each frequency, half the head dimension of them, in the place of ``sections``: row and column in
        turns and then time, ``(1, 2) * 22 + (0,) * 20``, in ERNIE-4.5-VL."""
        scaling: RopeScaling.Config | None = None
        """What changes the frequencies for longer sequences."""

        @property
        def num_axes(self) -> int:
            """Axes a position has."""
            return max(1, len(self.sections), 1 + max(self.axes, default=0))

    def __init__(self, config: Rope.Config, *, head_dim: int) -> None:
        if head_dim % 2:
            raise ConfigError(f"rotary positions turn pairs, so head_dim must be even, got {head_dim}")
        if config.sections and sum(config.sections) != head_dim // 2:
            raise ConfigError(f"rope sections {config.sections} must sum to half of head_dim {head_dim}")
        if config.axes and (config.sections or len(config.axes) != head_dim // 2 or not _counts_up(config.axes)):
            raise ConfigError(
                f"rope axes {config.axes} must name the axis, counted from 0, of each of the {head_dim // 2} "
                f"frequencies of head_dim {head_dim}, without sections beside it"
            )
        self.config = config
        self.head_dim = head_dim
        self.scaling = None if config.scaling is None else config.scaling.build()

    @property
    def num_axes(self) -> int:
        """Axes a position has."""
        return self.config.num_axes

    def table(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines of the angle of each pair.

        Args:
            positions: ``(N, A)``, A the number of axes; ``(N, 1)`` gives every axis the same position.

        Returns:
            ``(N, C/2)`` float32 each.

        Raises:
            ValueError: if A is neither 1 nor the number of axes.
        """
        if positions.shape[-1] not in (1, self.num_axes):
            raise ValueError(f"positions have {positions.shape[-1]} axes, rope has {self.num_axes}")
        pair = torch.arange(0, self.head_dim, 2, dtype=torch.float32, device=positions.device)
        # rounded as in the models that are converted: far positions multiply a difference
        frequency = 1.0 / self.config.theta ** (pair / self.head_dim)
        if self.scaling is not None:
            frequency = self.scaling.frequencies(frequency, self.config.theta)
        if positions.shape[-1] == 1:
            turned = positions.float()
        else:
            turned = positions.float()[:, torch.tensor(self._axes(), device=positions.device)]
        angle = turned * frequency
        if self.scaling is None or self.scaling.factor == 1.0:
            return angle.cos(), angle.sin()
        return angle.cos() * self.scaling.factor, angle.sin() * self.scaling.factor

    def _axes(self) -> list[int]:
        """The axis that each frequency turns with."""
        if self.config.axes:
            return list(self.config.axes)
        return [axis for axis, count in enumerate(self.config.sections) for _ in range(count)]


def _counts_up(axes: tuple[int, ...]) -> bool:
    """Whether every axis from 0 up is there, and no other."""
    return set(axes) == set(range(max(axes) + 1))


__all__ = ["Rope", "rope"]

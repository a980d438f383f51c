"""Rows of numbers in the order of time, such as the next actions of a robot, drawn by flow matching (pi0).

A row and the time of its noise go through one small network together, so rows at time 0 are marked as such too.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from omnimoe.config import ConfigError
from omnimoe.modalities.base import register_modality
from omnimoe.modalities.patches import Patches


@register_modality("trajectory")
class Trajectory(Patches):
    """A linear map in, two matrices over the row beside a code of its time, and a linear map out.

    Source: https://arxiv.org/abs/2410.24164.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config(Patches.Config):
        """A continuous modality of rows in the order of time."""

        objective: str = "flow"
        """As for patches."""
        loss_weight: float = 1.0
        """Weight of the mean squared error in ``out.loss``."""
        min_period: float = 4e-3
        """Shortest period of the sines and cosines of the time."""
        max_period: float = 4.0
        """Longest period."""

        def __post_init__(self) -> None:
            super().__post_init__()
            if not 0 < self.min_period < self.max_period:
                raise ConfigError(
                    f"periods must be positive and min_period below max_period, got {self.min_period} and "
                    f"{self.max_period}"
                )

        def active_params(self, hidden_size: int) -> int:
            return (2 * self.channels + 3 * hidden_size) * hidden_size

    initial = {"in_proj": "normal", "in_bias": 0.0, "out_proj": 0.0, "out_bias": 0.0}

    config: Trajectory.Config

    def __init__(self, config: Trajectory.Config, *, hidden_size: int) -> None:
        super().__init__(config, hidden_size=hidden_size)
        if hidden_size % 2:
            raise ConfigError(f"modality {config.name!r} needs rows of even width, got {hidden_size}")
        self.in_bias = nn.Parameter(torch.zeros(hidden_size))
        self.out_bias = nn.Parameter(torch.zeros(config.channels))
        self.time_in = nn.Linear(2 * hidden_size, hidden_size)
        self.time_out = nn.Linear(hidden_size, hidden_size)

    def embed(self, inputs: Tensor, timesteps: Tensor | None = None) -> Tensor:
        """Rows of numbers to model rows.

        Args:
            inputs: ``(n, C)``.
            timesteps: ``(n,)`` in [0, 1], 0 clean and 1 noise; None for clean rows.

        Returns:
            ``(n, D)``.
        """
        x = F.linear(inputs.to(self.in_proj), self.in_proj, self.in_bias)
        times = torch.zeros(len(x), device=x.device) if timesteps is None else timesteps.to(x.device)
        return self.time_out(F.silu(self.time_in(torch.cat((x, self._code(times).to(x.dtype)), dim=1))))

    def head(self, x: Tensor) -> Tensor:
        """``(n, D)`` to ``(n, C)``, the velocity."""
        return F.linear(x, self.out_proj, self.out_bias)

    def _code(self, times: Tensor) -> Tensor:
        """``(n,)`` to ``(n, D)`` float32: sines, then cosines, whose periods grow by a constant factor."""
        share = torch.linspace(0.0, 1.0, self.hidden_size // 2, device=times.device)
        period = self.config.min_period * (self.config.max_period / self.config.min_period) ** share
        angle = (1.0 / period * 2 * math.pi) * times.float().unsqueeze(1)
        return torch.cat((angle.sin(), angle.cos()), dim=1)

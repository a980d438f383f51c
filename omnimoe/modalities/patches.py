"""Continuous latents: patches of an autoencoder's latent, predicted by diffusion or flow matching.

The forward pass is deterministic: noise and times are drawn outside (:meth:`Patches.corrupt` applies them), so a step
can be repeated and a sampler is an ordinary loop over forwards.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from omnimoe.config import ConfigError
from omnimoe.modalities.base import Modality, register_modality

OBJECTIVES = ("flow", "ddpm")


def sine_code(times: Tensor, width: int) -> Tensor:
    """Cosines, then sines, of times at falling rates: ``(n,)`` to ``(n, width)`` float32, 0 at the end of an odd width.

    Source: https://arxiv.org/abs/1706.03762.
    """
    half = width // 2
    rate = torch.exp(-math.log(10_000.0) * torch.arange(half, device=times.device) / half)
    angle = times.float().unsqueeze(1) * rate
    return F.pad(torch.cat((angle.cos(), angle.sin()), dim=-1), (0, width % 2))


@register_modality("patches")
class Patches(Modality):
    """A linear map in, a linear map out, and the time of the noise added to the rows.

    Source: Transfusion's linear patches with DDPM, https://arxiv.org/abs/2408.11039; rectified flow,
    https://arxiv.org/abs/2209.03003.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config(Modality.Config):
        """A continuous modality of latent patches."""

        channels: int = 32
        """Width C of a patch: latent channels x patch height x patch width."""
        objective: str = "ddpm"
        """``"ddpm"`` predicts the noise under a cosine schedule, ``"flow"`` the velocity from data to noise."""
        loss_weight: float = 5.0
        """Weight of the mean squared error in ``out.loss``."""

        def __post_init__(self) -> None:
            super().__post_init__()
            if self.objective not in OBJECTIVES:
                raise ConfigError(f"unknown objective {self.objective!r}; known: {', '.join(OBJECTIVES)}")

        def active_params(self, hidden_size: int) -> int:
            return 2 * self.channels * hidden_size

    initial = {"in_proj": "normal", "out_proj": 0.0}
    has_row_times = True
    """Whether every row may have a time of its own."""

    def __init__(self, config: Patches.Config, *, hidden_size: int) -> None:
        super().__init__()
        self.config = config
        self.hidden_size = hidden_size
        self.in_proj = nn.Parameter(torch.empty(hidden_size, config.channels))
        self.out_proj = nn.Parameter(torch.empty(config.channels, hidden_size))
        self.reset_parameters()

    def reset_parameters(self, std: float = 0.02) -> None:
        """The head starts at zero, so that the first prediction is the mean."""
        nn.init.normal_(self.in_proj, std=std)
        nn.init.zeros_(self.out_proj)

    def embed(self, inputs: Tensor, timesteps: Tensor | None = None) -> Tensor:
        """Latent rows to model rows.

        Args:
            inputs: ``(n, C)``.
            timesteps: ``(n,)`` in [0, 1], 0 clean and 1 noise; None for clean rows.

        Returns:
            ``(n, D)``: a linear map plus a sinusoidal code of the time.
        """
        x = F.linear(inputs.to(self.in_proj.dtype), self.in_proj)
        if timesteps is None:
            timesteps = x.new_zeros(len(x))
        return x + sine_code(1000 * timesteps.float(), self.hidden_size).to(x.dtype)

    def head(self, x: Tensor) -> Tensor:
        """``(n, D)`` to ``(n, C)``: the noise (ddpm) or the velocity (flow)."""
        return F.linear(x, self.out_proj)

    def refilled(self, given: Any, rows: Tensor) -> Any:
        """Features in the form of ``given`` that hold ``rows (n, C)``."""
        return rows

    def corrupt(self, clean: Tensor, timesteps: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """Adds noise for a training step.

        Args:
            clean: ``(n, C)``.
            timesteps: ``(n,)`` in [0, 1].
            noise: ``(n, C)``, standard normal.

        Returns:
            The noisy rows and the target of the head, ``(n, C)`` each.
        """
        signal, scale = (part.unsqueeze(1) for part in self.schedule(timesteps))
        target = noise if self.config.objective == "ddpm" else noise - clean
        return signal * clean + scale * noise, target

    def schedule(self, timesteps: Tensor) -> tuple[Tensor, Tensor]:
        """The weights of data and noise at each time, ``(n,)`` each."""
        if self.config.objective == "flow":
            return 1 - timesteps, timesteps
        # the cosine schedule of https://arxiv.org/abs/2102.09672, kept off the ends where a division would blow up
        angle = (timesteps.clamp(0, 0.999) + 0.008) / 1.008 * math.pi / 2
        return angle.cos(), angle.sin()

    def step(self, noisy: Tensor, prediction: Tensor, time: float, next_time: float) -> Tensor:
        """One deterministic step of the sampler, from ``time`` to ``next_time``.

        Args:
            noisy: ``(n, C)`` rows at ``time``.
            prediction: ``(n, C)``, the head's output there.
            time: in (0, 1].
            next_time: in [0, time).

        Returns:
            ``(n, C)`` rows at ``next_time``: an Euler step (flow) or a DDIM step (ddpm).
        """
        if self.config.objective == "flow":
            return noisy + prediction * (next_time - time)
        signal, scale = self.schedule(torch.tensor(time, device=noisy.device))
        next_signal, next_scale = self.schedule(torch.tensor(next_time, device=noisy.device))
        clean = (noisy - scale * prediction) / signal
        return clean if next_time <= 0 else next_signal * clean + next_scale * prediction

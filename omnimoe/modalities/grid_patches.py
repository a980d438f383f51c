"""Latent patches of whole pictures: each row knows its row and column, and time goes through a small network (BAGEL).

Pictures may differ in size and shape, so features come picture by picture. A picture at time 0 is clean: it is a
condition, and nothing is predicted at its rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from omnimoe.config import ConfigError
from omnimoe.layers import SineGrid
from omnimoe.modalities.base import register_modality
from omnimoe.modalities.patches import Patches, sine_code


@register_modality("grid_patches")
class GridPatches(Patches):
    """A linear map in and out with biases, plus a code of the place and a learned code of the time.

    Source: https://arxiv.org/abs/2505.14683.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config(Patches.Config):
        """A continuous modality of pictures in latent patches."""

        objective: str = "flow"
        """As for patches."""
        loss_weight: float = 1.0
        """Weight of the mean squared error in ``out.loss``."""
        max_side: int = 64
        """Patches along a side of the largest picture."""
        time_width: int = 256
        """Width of the sines and cosines of the time."""

        def __post_init__(self) -> None:
            super().__post_init__()
            if self.max_side < 1 or self.time_width < 2 or self.time_width % 2:
                raise ConfigError(
                    f"max_side must be at least 1 and time_width even, got {self.max_side} and {self.time_width}"
                )

        @property
        def has_own_form(self) -> bool:
            return True

        def active_params(self, hidden_size: int) -> int:
            return (2 * self.channels + self.time_width + hidden_size) * hidden_size

    has_row_times = False
    initial = {"in_proj": "normal", "in_bias": 0.0, "out_proj": 0.0, "out_bias": 0.0}

    config: GridPatches.Config

    def __init__(self, config: GridPatches.Config, *, hidden_size: int) -> None:
        super().__init__(config, hidden_size=hidden_size)
        self.in_bias = nn.Parameter(torch.zeros(hidden_size))
        self.out_bias = nn.Parameter(torch.zeros(config.channels))
        self.time_in = nn.Linear(config.time_width, hidden_size)
        self.time_out = nn.Linear(hidden_size, hidden_size)
        self.place = SineGrid(config.max_side, hidden_size)

    def embed(self, inputs: Any, timesteps: Tensor | None = None) -> Tensor:
        """Pictures to model rows.

        Args:
            inputs: pictures ``(rows, columns, C)`` in order of batch and time, a list or one tensor ``(S, rows,
                columns, C)``.
            timesteps: ``(S,)`` in [0, 1], the time of each picture: 0 clean and 1 noise; None for clean ones.

        Returns:
            ``(n, D)``, row by row of each picture.

        Raises:
            ValueError: if ``inputs`` have another form.
        """
        pictures = self._pictures(inputs)
        if timesteps is None:
            timesteps = torch.zeros(len(pictures))
        if tuple(timesteps.shape) != (len(pictures),):
            raise ValueError(
                f"timesteps[{self.config.name!r}] must be ({len(pictures)},), one for each picture, "
                f"got {tuple(timesteps.shape)}"
            )
        device, side = self.in_proj.device, self.config.max_side
        counts = torch.tensor([picture.shape[0] * picture.shape[1] for picture in pictures], device=device)
        places = [
            (torch.arange(picture.shape[0]).unsqueeze(1) * side + torch.arange(picture.shape[1])).flatten()
            for picture in pictures
        ]
        latents = torch.cat([picture.flatten(0, 1) for picture in pictures]).to(device, self.in_proj.dtype)
        x = F.linear(latents, self.in_proj, self.in_bias) + self.place(torch.cat(places).to(device))
        return x + self._time(timesteps.to(device))[torch.repeat_interleave(counts)]

    def rows_of(self, given: Any) -> Tensor:
        """Targets, picture by picture as features are, or ``(n, C)``, to ``(n, C)``."""
        if isinstance(given, Tensor) and given.ndim == 2:
            return given
        return torch.cat([picture.flatten(0, 1) for picture in self._pictures(given)])

    def noise_of_rows(self, given: Any, timesteps: Tensor | None) -> Tensor | None:
        """``(n,)``, the time of each row of ``given``."""
        if timesteps is None:
            return None
        counts = [picture.shape[0] * picture.shape[1] for picture in self._pictures(given)]
        return timesteps.repeat_interleave(torch.tensor(counts, device=timesteps.device))

    def head(self, x: Tensor) -> Tensor:
        """``(n, D)`` to ``(n, C)``."""
        return F.linear(x, self.out_proj, self.out_bias)

    def _time(self, timesteps: Tensor) -> Tensor:
        code = sine_code(timesteps, self.config.time_width).to(self.time_in.weight.dtype)
        return self.time_out(F.silu(self.time_in(code)))

    def _pictures(self, inputs: Any) -> list[Tensor]:
        name, side, channels = self.config.name, self.config.max_side, self.config.channels
        is_sequence = isinstance(inputs, Sequence) or (isinstance(inputs, Tensor) and inputs.ndim == 4)
        pictures = list(inputs) if is_sequence else []
        for picture in pictures or [inputs]:
            fits = isinstance(picture, Tensor) and picture.ndim == 3 and picture.shape[2] == channels
            if not is_sequence or not fits or not 1 <= min(picture.shape[:2]) <= max(picture.shape[:2]) <= side:
                got = tuple(picture.shape) if isinstance(picture, Tensor) else type(picture).__name__
                raise ValueError(
                    f"features[{name!r}] must be pictures (rows, columns, {channels}) with at most {side} of each, "
                    f"in a list or one tensor, got {got}"
                )
        return pictures

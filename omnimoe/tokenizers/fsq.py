"""Finite scalar quantisation: a code is a point of a small grid, so there is no codebook to learn and none to collapse.

Each of ``d`` channels is bounded and rounded to one of ``levels[i]`` integers; the product of the levels is the number
of codes. Gradients pass the rounding straight through. All is computed in float32, whatever autocast says, because a
bfloat16 next to a rounding edge would give other ids in training than in use.

Source: Mentzer et al., https://arxiv.org/abs/2309.15505, appendix A.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn


class FSQ(nn.Module):
    """Quantises the last axis of its input to a grid of ``prod(levels)`` codes.

    Args:
        levels: number of values of each channel, 2 or more.

    Raises:
        ValueError: if ``levels`` is empty or one of them is below 2.

    Example:
        >>> fsq = FSQ((8, 5, 5, 5))
        >>> codes, ids = fsq(torch.zeros(2, 64, 4))
        >>> tuple(codes.shape), tuple(ids.shape), fsq.num_codes
        ((2, 64, 4), (2, 64), 1000)
    """

    def __init__(self, levels: Sequence[int]) -> None:
        super().__init__()
        if not levels or any(not isinstance(level, int) or level < 2 for level in levels):
            raise ValueError(f"levels must be integers of 2 or more, one a channel, got {tuple(levels)}")
        self.levels = tuple(levels)
        self.in_channels = self.channels = len(levels)
        self.num_codes = math.prod(levels)
        count = torch.tensor(levels, dtype=torch.float32)
        # Slightly above (L - 1) / 2, so that the outermost integers are reached and the shift is finite for two levels.
        half_range = (count - 1) * (1 + 1e-3) / 2
        offset = torch.where(count % 2 == 0, 0.5, 0.0)
        place_values = torch.cumprod(torch.tensor([1, *levels[:-1]]), 0)
        for name, value in (
            ("half_range", half_range),
            ("offset", offset),
            # Makes a zero input land on the integer 0 also where an even count shifts the grid by a half.
            ("shift", torch.atanh(offset / half_range)),
            ("half_width", (count / 2).floor()),
            ("place_values", place_values),
        ):
            self.register_buffer(name, value, persistent=False)

    def bound(self, z: Tensor) -> Tensor:
        """Squashes ``z (..., d)`` to the open range whose integers are the levels; float32."""
        return torch.tanh(z.float() + self.shift) * self.half_range - self.offset

    def quantize(self, z: Tensor) -> Tensor:
        """``z (..., d)`` to the nearest codes ``(..., d)``, float32 in ``[-1, 1]``, gradient straight through."""
        bounded = self.bound(z)
        rounded = bounded + (bounded.round() - bounded).detach()
        return rounded / self.half_width

    def codes_to_ids(self, codes: Tensor) -> Tensor:
        """Codes ``(..., d)`` to ids ``(...)``, int64 in ``0..num_codes-1``; the inverse of :meth:`ids_to_codes`."""
        digits = (codes.float() * self.half_width + self.half_width).round().long()
        return (digits * self.place_values).sum(-1)

    def ids_to_codes(self, ids: Tensor) -> Tensor:
        """Ids ``(...)`` int64 to codes ``(..., d)``, float32 in ``[-1, 1]``.

        Raises:
            ValueError: if an id is out of range.
        """
        if ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < self.num_codes:
            raise ValueError(f"ids must lie in 0..{self.num_codes - 1}, got {int(ids.min())}..{int(ids.max())}")
        levels = torch.tensor(self.levels, device=ids.device)
        digits = ids.unsqueeze(-1) // self.place_values % levels
        return (digits - self.half_width) / self.half_width

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Quantises.

        Args:
            z: ``(..., d)`` floating point, unbounded.

        Returns:
            codes ``(..., d)`` float32, with gradient, and ids ``(...)`` int64.
        """
        with torch.autocast(z.device.type, enabled=False):
            codes = self.quantize(z)
            return codes, self.codes_to_ids(codes.detach())

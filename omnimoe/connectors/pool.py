"""Fewer rows: windows of neighbours become one, by their mean or side by side, then another connector."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch.nn.functional as F
from torch import Tensor

from omnimoe.config import ConfigError
from omnimoe.connectors.base import Connector, register_connector
from omnimoe.connectors.projections import MLP

KINDS = ("average", "shuffle")


@register_connector("pool")
class Pool(Connector):
    """Windows of ``size`` x ``size`` cells of a square grid, or of ``size`` moments, to one row each.

    ``"average"`` takes the mean over what is not padding; ``"shuffle"`` puts the rows of a window side by side (a pixel
    unshuffle), which loses nothing. A grid or clip that does not divide is filled up with padding at its end.

    Source: https://arxiv.org/abs/2404.16821 (InternVL 1.5's pixel shuffle).
    """

    @dataclass(frozen=True, kw_only=True)
    class Config(Connector.Config):
        """Pooling before another connector."""

        size: int = 2
        """Side of a window."""
        kind: str = "average"
        """``"average"`` or ``"shuffle"``."""
        axes: int = 2
        """2 for a square grid, row by row from the top left; 1 for moments."""
        then: Connector.Config = field(default_factory=MLP.Config)
        """The connector that the pooled rows go through; one that keeps their number."""

        def __post_init__(self) -> None:
            super().__post_init__()
            if self.size < 1:
                raise ConfigError(f"size must be at least 1, got {self.size}")
            if self.kind not in KINDS:
                raise ConfigError(f"unknown kind {self.kind!r}; known: {', '.join(KINDS)}")
            if self.axes not in (1, 2):
                raise ConfigError(f"axes must be 1 or 2, got {self.axes}")

        def widened(self, channels: int) -> int:
            """Width of a pooled row."""
            return channels * (self.size**self.axes if self.kind == "shuffle" else 1)

        def active_params(self, channels: int, hidden_size: int) -> int:
            return self.then.active_params(self.widened(channels), hidden_size)

    def __init__(self, config: Pool.Config, *, channels: int, hidden_size: int) -> None:
        super().__init__()
        self.config = config
        self.then = config.then.build(channels=config.widened(channels), hidden_size=hidden_size)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        real = x.new_ones(x.shape[:2]) if mask is None else mask.to(x.dtype)
        # (B, m, w, C) and (B, m, w, 1): the cells of each window, and whether they are real
        cells = self._windows(x * real.unsqueeze(-1))
        counts = self._windows(real.unsqueeze(-1)).sum(2)
        pooled = cells.sum(2) / counts.clamp_min(1) if self.config.kind == "average" else cells.flatten(2)
        return self.then(pooled, None if mask is None else counts.squeeze(-1) > 0)

    def num_rows(self, length: int) -> int:
        return self.then.num_rows(math.ceil(self._side(length) / self.config.size) ** self.config.axes)

    def row_mask(self, mask: Tensor) -> Tensor:
        return self.then.row_mask(self._windows(mask.unsqueeze(-1)).any(2).squeeze(-1))

    def _side(self, length: int) -> int:
        if self.config.axes == 1:
            return length
        side = math.isqrt(length)
        if side * side != length:
            raise ValueError(
                f"{length} rows are no square grid; write axes=1 to pool them as moments, or encode square pictures"
            )
        return side

    def _windows(self, x: Tensor) -> Tensor:
        """``(B, n, C)`` to ``(B, m, w, C)``."""
        size, axes, side = self.config.size, self.config.axes, self._side(x.shape[1])
        missing = -side % size
        if axes == 1:
            return F.pad(x, (0, 0, 0, missing)).unflatten(1, (-1, size))
        grid = F.pad(x.unflatten(1, (side, side)), (0, 0, 0, missing, 0, missing))
        grid = grid.unflatten(2, (-1, size)).unflatten(1, (-1, size))  # (B, rows, size, columns, size, C)
        return grid.transpose(2, 3).flatten(3, 4).flatten(1, 2)

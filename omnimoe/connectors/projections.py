"""Connectors that look at one row at a time."""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn

from omnimoe.config import ConfigError
from omnimoe.connectors.base import Connector, register_connector

_APPROXIMATIONS = {"gelu": "none", "gelu_tanh": "tanh"}


@register_connector("as_is")
class AsIs(Connector):
    """Nothing: rows that have the model's width already."""

    @dataclass(frozen=True, kw_only=True)
    class Config(Connector.Config):
        """Nothing to choose."""

    def __init__(self, config: AsIs.Config, *, channels: int, hidden_size: int) -> None:
        super().__init__()
        self.config = config

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        return x


@register_connector("linear")
class Linear(Connector):
    """One matrix.

    Source: LLaVA, https://arxiv.org/abs/2304.08485.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config(Connector.Config):
        """A linear map."""

        norm: bool = True
        """Bring each row to zero mean and unit variance first: encoders differ in scale by orders of magnitude."""

        def active_params(self, channels: int, hidden_size: int) -> int:
            return channels * hidden_size

    def __init__(self, config: Linear.Config, *, channels: int, hidden_size: int) -> None:
        super().__init__()
        self.config = config
        self.norm = nn.LayerNorm(channels) if config.norm else nn.Identity()
        self.proj = nn.Linear(channels, hidden_size)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        return self.proj(self.norm(x))


@register_connector("mlp")
class MLP(Connector):
    """Two matrices with a GELU between them.

    Source: LLaVA-1.5, https://arxiv.org/abs/2310.03744.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config(Connector.Config):
        """A two-layer perceptron."""

        intermediate_size: int | None = None
        """Width between the matrices; the model's where None."""
        norm: bool = True
        """Bring each row to zero mean and unit variance first."""
        activation: str = "gelu"
        """``"gelu"``, or ``"gelu_tanh"`` for its approximation by a hyperbolic tangent."""

        def __post_init__(self) -> None:
            super().__post_init__()
            if self.intermediate_size is not None and self.intermediate_size < 1:
                raise ConfigError(f"intermediate_size must be at least 1, got {self.intermediate_size}")
            if self.activation not in _APPROXIMATIONS:
                raise ConfigError(f"unknown activation {self.activation!r}; known: {', '.join(_APPROXIMATIONS)}")

        def active_params(self, channels: int, hidden_size: int) -> int:
            return (self.intermediate_size or hidden_size) * (channels + hidden_size)

    def __init__(self, config: MLP.Config, *, channels: int, hidden_size: int) -> None:
        super().__init__()
        self.config = config
        width = config.intermediate_size or hidden_size
        self.norm = nn.LayerNorm(channels) if config.norm else nn.Identity()
        self.up_proj = nn.Linear(channels, width)
        self.down_proj = nn.Linear(width, hidden_size)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        return self.down_proj(F.gelu(self.up_proj(self.norm(x)), approximate=_APPROXIMATIONS[self.config.activation]))

"""Features of an encoder that come as wide as the model, and that enter later layers of it too (DeepStack)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import Tensor

from omnimoe.config import ConfigError
from omnimoe.connectors import AsIs, Connector
from omnimoe.modalities.base import register_modality
from omnimoe.modalities.connected import Connected


@register_modality("deep")
class Deep(Connected):
    """An encoder that is a part of the model. The first D columns of its rows enter the model; each D more are added
    to what they became, after the first layer, after the second, and so on.

    Source: https://arxiv.org/abs/2406.04334.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config(Connected.Config):
        """A modality of features for several layers."""

        connector: Connector.Config = field(default_factory=AsIs.Config)
        """As for connected features; the encoder brings rows to the model's width itself."""
        trains_encoder: bool = True
        """Without its encoder the modality would have no weights."""
        depth: int = 0
        """Layers after which something is added."""

        def __post_init__(self) -> None:
            super().__post_init__()
            if not self.trains_encoder:
                raise ConfigError(f"modality {self.name!r} is its encoder; leave trains_encoder True")
            if self.depth < 0 or self.channels % (1 + self.depth):
                raise ConfigError(
                    f"channels {self.channels} of modality {self.name!r} must be the width of the model for what "
                    f"enters and for each of {self.depth} layers"
                )

    config: Deep.Config

    def __init__(self, config: Deep.Config, *, hidden_size: int) -> None:
        if config.channels != hidden_size * (1 + config.depth):
            raise ConfigError(
                f"modality {config.name!r} has channels {config.channels}; {1 + config.depth} times a width of "
                f"{hidden_size} are {hidden_size * (1 + config.depth)}"
            )
        super().__init__(config, hidden_size=hidden_size)

    def layered(self, embedded: Tensor) -> Sequence[Tensor]:
        return embedded.split(embedded.shape[1] // (1 + self.config.depth), dim=1)

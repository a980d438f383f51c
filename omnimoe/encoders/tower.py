"""What the configs of vision towers have in common."""

from __future__ import annotations

from dataclasses import dataclass

from omnimoe.config import ConfigError
from omnimoe.encoders.base import Encoder


@dataclass(frozen=True, kw_only=True)
class TowerConfig(Encoder.Config):
    """A transformer over patches of pictures; the defaults are those of SigLIP So400m."""

    hidden_size: int = 1152
    """Width of the tower."""
    intermediate_size: int = 4304
    """Width of its feed-forward networks."""
    num_layers: int = 27
    """Layers."""
    num_heads: int = 16
    """Heads; they must divide the width."""
    patch_size: int = 14
    """Side of a patch in pixels."""
    activation: str = "gelu_pytorch_tanh"
    """Of the feed-forward networks, as transformers names it."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_positive("num_layers", "num_heads", "patch_size")
        if self.hidden_size % self.num_heads:
            raise ConfigError(f"num_heads {self.num_heads} must divide hidden_size {self.hidden_size}")


__all__ = ["TowerConfig"]

"""A fixed number of learned queries that read any number of feature rows: the Perceiver resampler.

Source: Perceiver, https://arxiv.org/abs/2103.03206; Flamingo's resampler, https://arxiv.org/abs/2204.14198.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from omnimoe.config import ConfigError
from omnimoe.connectors.base import Connector, register_connector


class ResamplerBlock(nn.Module):
    """Queries look at features and at each other in one attention, then an MLP; residual, pre-norm."""

    def __init__(self, hidden_size: int, num_heads: int) -> None:
        super().__init__()
        self.norm_features = nn.LayerNorm(hidden_size)
        self.norm_queries = nn.LayerNorm(hidden_size)
        self.attention = nn.MultiheadAttention(hidden_size, num_heads, bias=False, batch_first=True)
        self.norm_mlp = nn.LayerNorm(hidden_size)
        self.up_proj = nn.Linear(hidden_size, 4 * hidden_size, bias=False)
        self.down_proj = nn.Linear(4 * hidden_size, hidden_size, bias=False)

    def forward(self, queries: Tensor, features: Tensor, is_padding: Tensor | None) -> Tensor:
        """``(B, m, D)`` and ``(B, n, D)`` to ``(B, m, D)``."""
        asked = self.norm_queries(queries)
        seen = torch.cat((self.norm_features(features), asked), dim=1)
        if is_padding is not None:
            is_padding = F.pad(is_padding, (0, queries.shape[1]))
        queries = queries + self.attention(asked, seen, seen, key_padding_mask=is_padding, need_weights=False)[0]
        return queries + self.down_proj(F.gelu(self.up_proj(self.norm_mlp(queries))))


@register_connector("latent_queries")
class LatentQueries(Connector):
    """``num_queries`` rows for every input, however long."""

    @dataclass(frozen=True, kw_only=True)
    class Config(Connector.Config):
        """A Perceiver resampler at the model's width."""

        num_queries: int = 16
        """Rows that an input becomes."""
        num_layers: int = 2
        """Blocks; each looks at the features again."""
        num_heads: int = 4
        """Attention heads; they must divide the model's width."""

        def __post_init__(self) -> None:
            super().__post_init__()
            self.check_positive("num_queries", "num_layers", "num_heads")

        def active_params(self, channels: int, hidden_size: int) -> int:
            return self.num_layers * 12 * hidden_size**2

    initial = {"queries": "normal"}

    def __init__(self, config: LatentQueries.Config, *, channels: int, hidden_size: int) -> None:
        super().__init__()
        if hidden_size % config.num_heads:
            raise ConfigError(f"num_heads {config.num_heads} does not divide the model's hidden_size {hidden_size}")
        self.config = config
        self.in_proj = nn.Linear(channels, hidden_size)
        self.queries = nn.Parameter(0.02 * torch.randn(config.num_queries, hidden_size))
        self.blocks = nn.ModuleList(ResamplerBlock(hidden_size, config.num_heads) for _ in range(config.num_layers))
        self.norm = nn.LayerNorm(hidden_size)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        features = self.in_proj(x)
        queries = self.queries.expand(len(x), -1, -1)
        for block in self.blocks:
            queries = block(queries, features, None if mask is None else ~mask)
        return self.norm(queries)

    def num_rows(self, length: int) -> int:
        return self.config.num_queries

    def row_mask(self, mask: Tensor) -> Tensor:
        return mask.new_ones(len(mask), self.config.num_queries)

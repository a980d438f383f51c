"""The Q-Former of BLIP-2, transformers' own: queries that attend to each other and, in some layers, to the features.

Source: https://arxiv.org/abs/2301.12597.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from omnimoe.config import ConfigError
from omnimoe.connectors.base import Connector, register_connector


@register_connector("q_former")
class QFormer(Connector):
    """``num_queries`` rows for every input, through a small transformer of an own width, then a linear map."""

    @dataclass(frozen=True, kw_only=True)
    class Config(Connector.Config):
        """A Q-Former."""

        num_queries: int = 32
        """Rows that an input becomes."""
        hidden_size: int = 256
        """Width inside; BLIP-2 has 768."""
        intermediate_size: int = 1024
        """Width of its feed-forward layers."""
        num_layers: int = 4
        """Layers; BLIP-2 has 12."""
        num_heads: int = 4
        """Attention heads; they must divide ``hidden_size``."""
        cross_attention_frequency: int = 2
        """Every how many layers queries look at the features, counted from the first."""
        dropout: float = 0.0
        """Of hidden states and attention weights; BLIP-2 trains with 0.1."""

        def __post_init__(self) -> None:
            super().__post_init__()
            self.check_positive("num_queries", "num_layers", "num_heads", "cross_attention_frequency")
            if self.hidden_size % self.num_heads:
                raise ConfigError(f"num_heads {self.num_heads} does not divide hidden_size {self.hidden_size}")

        def active_params(self, channels: int, hidden_size: int) -> int:
            crossed = -(-self.num_layers // self.cross_attention_frequency)
            own = self.num_layers * (4 * self.hidden_size**2 + 2 * self.hidden_size * self.intermediate_size)
            return own + crossed * 2 * self.hidden_size**2 + self.hidden_size * hidden_size

    initial = {"queries": "normal"}

    def __init__(self, config: QFormer.Config, *, channels: int, hidden_size: int) -> None:
        super().__init__()
        from transformers import Blip2QFormerConfig, Blip2QFormerModel

        self.config = config
        self.queries = nn.Parameter(0.02 * torch.randn(config.num_queries, config.hidden_size))
        self.network = Blip2QFormerModel(
            Blip2QFormerConfig(
                hidden_size=config.hidden_size,
                num_hidden_layers=config.num_layers,
                num_attention_heads=config.num_heads,
                intermediate_size=config.intermediate_size,
                cross_attention_frequency=config.cross_attention_frequency,
                encoder_hidden_size=channels,
                hidden_dropout_prob=config.dropout,
                attention_probs_dropout_prob=config.dropout,
            )
        )
        self.out_proj = nn.Linear(config.hidden_size, hidden_size)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        out = self.network(
            query_embeds=self.queries.expand(len(x), -1, -1),
            encoder_hidden_states=x,
            encoder_attention_mask=None if mask is None else mask.long(),
        )
        return self.out_proj(out.last_hidden_state)

    def num_rows(self, length: int) -> int:
        return self.config.num_queries

    def row_mask(self, mask: Tensor) -> Tensor:
        return mask.new_ones(len(mask), self.config.num_queries)

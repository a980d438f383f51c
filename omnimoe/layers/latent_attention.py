"""Attention over latents: keys and values are kept as one narrow vector a token, and widened when they are attended to.

The rotary part of a key is apart from it and shared by all heads. A cache holds the vector and that part. A decoded
token widens nothing: its query is narrowed instead.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from omnimoe.layers.attention import BaseAttention, register_attention, scaled_dot_product
from omnimoe.layers.bank import TowerMap, plain, resolve_towers
from omnimoe.layers.linear import BankLinear
from omnimoe.layers.masks import AttentionMask
from omnimoe.layers.norm import BankRMSNorm
from omnimoe.layers.rope import Rope, rope
from omnimoe.layers.rows import RowLayout


@register_attention("latent_attention")
class LatentAttention(BaseAttention):
    """Multi-head latent attention.

    Source: DeepSeek-V2, https://arxiv.org/abs/2405.04434.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config(BaseAttention.Config):
        """Latent attention."""

        num_heads: int = 16
        """Heads."""
        query_rank: int | None = None
        """Width that queries are narrowed to on the way; None for one matrix."""
        latent_rank: int = 512
        """Width of what is kept of a token for its keys and values."""
        plain_dim: int = 128
        """Width of the part of a head's query and key that is not turned."""
        rope_dim: int = 64
        """Width of the part that is."""
        value_dim: int = 128
        """Width of a head's value."""
        bias: bool = False
        """Biases on what narrows."""
        output_bias: bool = False
        """A bias on o."""
        norm_eps: float = 1e-6
        """Added to the mean square in the norms of what was narrowed."""
        sharpness: float = 1.0
        """What scores are multiplied by besides ``1 / sqrt(plain_dim + rope_dim)``."""
        rope: Rope.Config = field(default_factory=Rope.Config)
        """Rotary positions."""
        towers: TowerMap = "shared"
        """The copy each key's rows meet, at every site but the one that widens keys and values: that one works on what
        a cache held, which knows no keys, and is shared."""

        def __post_init__(self) -> None:
            super().__post_init__()
            self.check_positive("num_heads", "query_rank", "latent_rank", "plain_dim", "rope_dim", "value_dim")

        @property
        def needs_key_order(self) -> bool:
            return self.towers != "shared"

        def projection_params(self, hidden_size: int) -> int:
            """Weights in matrix products of a token, without a cache."""
            queries = self.num_heads * (self.plain_dim + self.rope_dim)
            into = hidden_size * queries if self.query_rank is None else self.query_rank * (hidden_size + queries)
            into += hidden_size * (self.latent_rank + self.rope_dim)
            widened = self.latent_rank * self.num_heads * (self.plain_dim + self.value_dim)
            return into + widened + self.num_heads * self.value_dim * hidden_size

        def vector_params(self, hidden_size: int) -> int:
            """Weights outside of matrices: norms and biases."""
            narrowed = (self.query_rank or 0) + self.latent_rank + self.rope_dim
            norms = (self.query_rank or 0) + self.latent_rank
            return norms + narrowed * self.bias + hidden_size * self.output_bias

        def mixing_flops(self, hidden_size: int, length: int) -> int:
            """FLOP of a token's scores and of the sum of values, over a sequence of ``length``."""
            return 2 * length * self.num_heads * (self.plain_dim + self.rope_dim + self.value_dim)

    def __init__(
        self, config: LatentAttention.Config, *, hidden_size: int, num_modalities: int, layer_idx: int
    ) -> None:
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.num_heads = config.num_heads
        self.num_key_value_groups = 1
        self.head_dim = config.plain_dim + config.rope_dim
        self.scaling = config.sharpness * self.head_dim**-0.5
        self.is_causal = True
        towers = resolve_towers(config.towers, num_modalities)
        queries = config.num_heads * self.head_dim
        self.q_proj = None
        if config.query_rank is None:
            self.q_proj = BankLinear(towers, hidden_size, queries)
        else:
            self.q_down_proj = BankLinear(towers, hidden_size, config.query_rank, config.bias)
            self.q_norm = BankRMSNorm(towers, config.query_rank, config.norm_eps)
            self.q_up_proj = BankLinear(towers, config.query_rank, queries)
        self.kv_down_proj = BankLinear(towers, hidden_size, config.latent_rank + config.rope_dim, config.bias)
        self.kv_norm = BankRMSNorm(towers, config.latent_rank, config.norm_eps)
        widened = config.num_heads * (config.plain_dim + config.value_dim)
        self.kv_up_proj = BankLinear((0,) * num_modalities, config.latent_rank, widened)
        self.o_proj = BankLinear(towers, config.num_heads * config.value_dim, hidden_size, config.output_bias)

    def rotary(self) -> tuple[Rope.Config, int] | None:
        """See :class:`BaseAttention`."""
        return self.config.rope, self.config.rope_dim

    def forward(
        self, x: Tensor, rows: RowLayout, mask: AttentionMask, cache: Any = None
    ) -> tuple[Tensor, Tensor | None]:
        """Mixes positions.

        Args:
            x: ``(N, D)`` rows.
            rows: their layout, with the rotary table.
            mask: who may attend to whom.
            cache: a transformers cache that already holds what came before, or None.

        Returns:
            ``(N, D)`` rows, and ``(B, H, Q, K)`` attention weights where the implementation gives them.
        """
        if rows.cos is None or rows.sin is None:
            raise ValueError("latent attention turns queries and keys; its rows need a rotary table")
        query = self._queries(x, rows).view(len(x), self.num_heads, self.head_dim)
        straight, turned = query.split((self.config.plain_dim, self.config.rope_dim), dim=-1)
        query = torch.cat((straight, rope(turned.contiguous(), rows.cos, rows.sin)), dim=-1)
        latent, key = self.kv_down_proj(x, rows).split((self.config.latent_rank, self.config.rope_dim), dim=-1)
        latent = self.kv_norm(latent.contiguous(), rows)
        key = rope(key.unsqueeze(1).contiguous(), rows.cos, rows.sin)
        # a cache keeps heads of tokens, of which there is one here
        query, latent, key = (rows.to_time(part).transpose(1, 2) for part in (query, latent.unsqueeze(1), key))
        if cache is not None:
            latent, key = cache.update(latent, key, self.layer_idx)
        if query.shape[2] == 1 and mask.attend is None:
            mixed, weights = self._attend_latents(query, latent, key, mask), None
        else:
            key, value = self._widen(latent.squeeze(1), key)
            mixed, weights = (mask.attend or scaled_dot_product)(self, query, key, value, mask)
        return self.o_proj(rows.to_rows(mixed.flatten(2)), rows), weights

    def _queries(self, x: Tensor, rows: RowLayout) -> Tensor:
        if self.q_proj is not None:
            return self.q_proj(x, rows)
        return self.q_up_proj(self.q_norm(self.q_down_proj(x, rows), rows), rows)

    def _widen(self, latent: Tensor, turned: Tensor) -> tuple[Tensor, Tensor]:
        """``(B, K, R)`` and ``(B, 1, K, C_rope)`` to keys ``(B, H, K, C)`` and values ``(B, H, K, C_value)``."""
        config = self.config
        wide = F.linear(latent, self.kv_up_proj.weight.squeeze(0)).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
        straight, value = wide.split((config.plain_dim, config.value_dim), dim=-1)
        return torch.cat((straight, turned.expand(-1, self.num_heads, -1, -1)), dim=-1), value

    def _attend_latents(self, query: Tensor, latent: Tensor, turned: Tensor, mask: AttentionMask) -> Tensor:
        """Attention of one query a head, ``(B, H, 1, C)``, that widens no key: it is the query that is narrowed.

        A product of a query with a widened latent is one of the narrowed query with the latent, and the sum of widened
        values is the widened sum, so all heads read the cached ``(B, 1, K, R)`` itself.

        Returns:
            ``(B, 1, H, C_value)``.
        """
        up_proj = plain(self.kv_up_proj.weight).squeeze(0).unflatten(0, (self.num_heads, -1))
        key_up, value_up = up_proj.split((self.config.plain_dim, self.config.value_dim), dim=1)  # (H, C_plain, R), ...
        straight, rotated = query.split((self.config.plain_dim, self.config.rope_dim), dim=-1)
        narrowed = torch.cat((straight @ key_up, rotated), dim=-1)
        mixed, _ = scaled_dot_product(self, narrowed, torch.cat((latent, turned), dim=-1), latent, mask)
        return (mixed.transpose(1, 2) @ value_up.transpose(1, 2)).transpose(1, 2)

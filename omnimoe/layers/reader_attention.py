"""Attention of towers that read others: a key shows readers another face than it shows its own tower (Cosmos3 Edge).

Queries and keys of readers are normalised, those of the others are not; and readers see the keys of the others through
a norm of their own. Both faces of a key lie side by side, and a query is zero where the face that it does not look at
lies: one attention under any mask does it, and a cache holds both.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from omnimoe.config import ConfigError
from omnimoe.layers.attention import Attention, register_attention
from omnimoe.layers.masks import AttentionMask
from omnimoe.layers.norm import BankRMSNorm
from omnimoe.layers.rope import rope
from omnimoe.layers.rows import RowLayout


@register_attention("reader_attention")
class ReaderAttention(Attention):
    """Grouped-query attention with norms of queries and keys where rows of readers are concerned, and only there.

    Source: https://arxiv.org/abs/2606.02800.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config(Attention.Config):
        """Attention with readers."""

        qk_norm: str = "rms"
        """Of readers; there is no other form than ``"rms"``."""
        readers: tuple[bool, ...] = ()
        """Whether rows of each key are readers, one entry a key."""

        def __post_init__(self) -> None:
            super().__post_init__()
            if self.qk_norm != "rms":
                raise ConfigError(f"readers have the qk_norm 'rms', got {self.qk_norm!r}")
            if "qk_norm" in self.site_towers:
                raise ConfigError("the norms of readers have one copy; leave qk_norm out of site_towers")

        @property
        def needs_key_order(self) -> bool:
            return True

        @property
        def tp_plan(self) -> dict[str, str]:
            return {}

        def vector_params(self, hidden_size: int) -> int:
            """Weights outside of matrices: three norms and biases."""
            head_dim = self.head_dim or hidden_size // self.num_heads
            heads = self.num_heads + 2 * (self.num_kv_heads or self.num_heads)
            return 3 * head_dim + heads * head_dim * self.bias + hidden_size * self.output_bias

        def mixing_flops(self, hidden_size: int, length: int) -> int:
            """FLOP of a token's scores, over both faces, and of the sum of values, over a sequence of ``length``."""
            return 6 * length * self.num_heads * (self.head_dim or hidden_size // self.num_heads)

    def __init__(
        self, config: ReaderAttention.Config, *, hidden_size: int, num_modalities: int, layer_idx: int
    ) -> None:
        if len(config.readers) != num_modalities:
            raise ConfigError(
                f"readers {config.readers} has {len(config.readers)} entries for {num_modalities} keys; give one a key"
            )
        super().__init__(config, hidden_size=hidden_size, num_modalities=num_modalities, layer_idx=layer_idx)
        self.readers = config.readers
        shared = (0,) * num_modalities
        self.q_norm: nn.Module = BankRMSNorm(shared, self.head_dim, config.qk_norm_eps)
        self.k_norm: nn.Module = BankRMSNorm(shared, self.head_dim, config.qk_norm_eps)
        self.read_norm = BankRMSNorm(shared, self.head_dim, config.qk_norm_eps)

    def forward(
        self, x: Tensor, rows: RowLayout, mask: AttentionMask, cache: Any = None
    ) -> tuple[Tensor, Tensor | None]:
        """See :meth:`Attention.forward`."""
        query, key, value = (self._heads(site(x, rows)) for site in (self.q_proj, self.k_proj, self.v_proj))
        reads = torch.tensor(self.readers, device=x.device)[rows.key_ids].view(-1, 1, 1)
        query = torch.where(reads, self.q_norm(query, rows), query)
        own = torch.where(reads, self.k_norm(key, rows), key)
        shown = torch.where(reads, own, self.read_norm(key, rows))
        if rows.cos is not None and rows.sin is not None and self.rope is not None:
            query, own, shown = (rope(part, rows.cos, rows.sin) for part in (query, own, shown))
        nothing = torch.zeros_like(query)
        query = torch.cat((torch.where(reads, nothing, query), torch.where(reads, query, nothing)), dim=-1)
        key = torch.cat((own, shown), dim=-1)
        query, key, value = (rows.to_time(part).transpose(1, 2) for part in (query, key, value))
        if cache is not None:
            key, value = cache.update(key, value, self.layer_idx)
        mixed, weights = self._attend(query, key, value, mask)
        return self.o_proj(rows.to_rows(mixed.flatten(2)), rows), weights

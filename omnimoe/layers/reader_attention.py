"""Attention of towers that read others: a key shows readers another face than it shows its own tower (Cosmos3 Edge).

Queries and keys of readers are normalised, those of the others are not; and readers see the keys of the others through
a norm of their own. Both faces of a key lie side by side, and a query is zero where the face that it does not look at
lies: one attention under any mask does it, and a cache holds both. Where all queries look at one face, as in a decoded
word or a step of drawing, the other is not attended to.
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
        reads = self._all_read(rows)
        query, own, shown = self._normed(query, key, rows, reads)
        if rows.cos is not None and rows.sin is not None and self.rope is not None:
            query = rope(query, rows.cos, rows.sin)
            # one turn where both faces are one
            turned = rope(own, rows.cos, rows.sin)
            own, shown = turned, turned if shown is own else rope(shown, rows.cos, rows.sin)
        if reads is None:
            mine = self._reads(rows)
            nothing = torch.zeros_like(query)
            query = torch.cat((torch.where(mine, nothing, query), torch.where(mine, query, nothing)), dim=-1)
        key = torch.cat((own, shown), dim=-1)
        query, key, value = (rows.to_time(part).transpose(1, 2) for part in (query, key, value))
        if cache is not None:
            key, value = cache.update(key, value, self.layer_idx)
        if reads is not None:
            # all look at one face, and the other is left out
            key = key[..., self.head_dim :] if reads else key[..., : self.head_dim]
        mixed, weights = self._attend(query, key, value, mask)
        return self.o_proj(rows.to_rows(mixed.flatten(2)), rows), weights

    def _normed(self, query: Tensor, key: Tensor, rows: RowLayout, reads: bool | None) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, and both faces of the keys."""
        if reads is not None:
            own = self.k_norm(key, rows) if reads else key
            return self.q_norm(query, rows) if reads else query, own, own if reads else self.read_norm(key, rows)
        mine = self._reads(rows)
        own = torch.where(mine, self.k_norm(key, rows), key)
        return (
            torch.where(mine, self.q_norm(query, rows), query),
            own,
            torch.where(mine, own, self.read_norm(key, rows)),
        )

    def _reads(self, rows: RowLayout) -> Tensor:
        """``(N, 1, 1)`` bool, the rows of readers."""
        return torch.tensor(self.readers, device=rows.key_ids.device)[rows.key_ids].view(-1, 1, 1)

    def _all_read(self, rows: RowLayout) -> bool | None:
        """Whether all rows are readers or none is, where that is known without waiting for an accelerator."""
        if rows.offsets.device.type != "cpu" or torch.compiler.is_compiling() or torch.is_grad_enabled():
            return None  # with gradients all norms take part
        held = {self.readers[key] for key, (start, stop) in enumerate(rows.key_spans()) if stop > start}
        return held.pop() if len(held) == 1 else None

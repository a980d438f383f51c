"""Norms inside of a branch, before its last product: sub-LN, as Magneto and BEiT-3 have them."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from omnimoe.layers.attention import Attention, register_attention
from omnimoe.layers.bank import resolve_towers
from omnimoe.layers.linear import BankLinear
from omnimoe.layers.norm import BankLayerNorm
from omnimoe.layers.rows import RowLayout


class NormedLinear(BankLinear):
    """A LayerNorm and a linear map behind it, one copy of both a tower.

    Args:
        towers: the copy of each key, resolved.
        in_features: D.
        out_features: F.
        bias: add a bias, one a copy.
        eps: added to the variance.
    """

    def __init__(
        self, towers: tuple[int, ...], in_features: int, out_features: int, bias: bool = False, eps: float = 1e-5
    ) -> None:
        super().__init__(towers, in_features, out_features, bias)
        self.norm = BankLayerNorm(towers, (in_features,), eps)

    def forward(self, x: Tensor, rows: RowLayout) -> Tensor:
        """``(N, D)`` rows to ``(N, F)``, each through the copy of its key."""
        return super().forward(self.norm(x, rows), rows)


@register_attention("sub_norm_attention")
class SubNormAttention(Attention):
    """Grouped-query attention with a LayerNorm over all heads together before the projection out.

    Source: https://arxiv.org/abs/2210.06423.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config(Attention.Config):
        """Attention with a norm inside."""

        inner_norm_eps: float = 1e-5
        """Added to the variance in the inner norm."""

        @property
        def tp_plan(self) -> dict[str, str]:
            return {}  # the inner norm would need all heads on every device

    def __init__(
        self, config: SubNormAttention.Config, *, hidden_size: int, num_modalities: int, layer_idx: int
    ) -> None:
        super().__init__(config, hidden_size=hidden_size, num_modalities=num_modalities, layer_idx=layer_idx)
        towers = resolve_towers(config.site_towers.get("o_proj", config.towers), num_modalities)
        heads = self.num_heads * self.head_dim
        self.o_proj = NormedLinear(towers, heads, hidden_size, config.output_bias, config.inner_norm_eps)


__all__ = ["NormedLinear", "SubNormAttention"]

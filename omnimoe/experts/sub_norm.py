"""A feed-forward bank with biases and a LayerNorm between its products."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from omnimoe.experts.base import Experts, check_network, register_experts
from omnimoe.layers import BankLinear, NormedLinear, RowLayout, TowerMap, resolve_towers
from omnimoe.ops import ACTIVATIONS, GATED
from omnimoe.routers import Routing


@register_experts("sub_norm_feed_forward")
class SubNormFeedForward(Experts):
    """``down(norm(act(up(x))))`` through the copy of the row's key; with a gate ``down(norm(act(gate(x)) * up(x)))``.

    Source: sub-LN of Magneto, https://arxiv.org/abs/2210.06423; a copy a modality with it BEiT-3,
    https://arxiv.org/abs/2208.10442, and with a gate ONE-PEACE, https://arxiv.org/abs/2305.11172.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config(Experts.Config):
        """A feed-forward network with a norm inside, one copy a tower."""

        intermediate_size: int = 1024
        """Width F of a copy."""
        activation: str = "gelu"
        """A name of ``omnimoe.ops.ACTIVATIONS``."""
        gated: bool = False
        """Multiply by the activated gate."""
        bias: bool = True
        """Biases on all products."""
        input_bias: bool = True
        """Of them also that before the norm."""
        inner_norm_eps: float = 1e-5
        """Added to the variance in the inner norm."""
        towers: TowerMap = "shared"
        """The copy each key's rows meet."""

        def __post_init__(self) -> None:
            super().__post_init__()
            check_network(self.intermediate_size, self.activation, self.gated)

        @property
        def needs_key_order(self) -> bool:
            return self.towers != "shared"

        def active_params(self, hidden_size: int, modality: int) -> float:
            return (3 if self.gated else 2) * hidden_size * self.intermediate_size

    def __init__(
        self, config: SubNormFeedForward.Config, *, hidden_size: int, num_modalities: int, layer_idx: int
    ) -> None:
        super().__init__()
        self.towers = resolve_towers(config.towers, num_modalities)
        self.activation, self.gated = config.activation, config.gated
        inner = config.intermediate_size
        self.gate_up_proj = BankLinear(
            self.towers, hidden_size, (2 if self.gated else 1) * inner, config.bias and config.input_bias
        )
        self.down_proj = NormedLinear(self.towers, inner, hidden_size, config.bias, config.inner_norm_eps)

    def forward(self, x: Tensor, rows: RowLayout) -> tuple[Tensor, Routing | None]:
        """``(N, D)`` rows to ``(N, D)``, and no routing, since none was learned."""
        inner = self.gate_up_proj(x, rows)
        parts = inner.chunk(2, dim=-1) if self.gated else (inner,)
        return self.down_proj((GATED if self.gated else ACTIVATIONS)[self.activation](*parts), rows), None


__all__ = ["SubNormFeedForward"]

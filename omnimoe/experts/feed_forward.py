"""A feed-forward bank without learned routing: one copy is a dense network, one a tower is Mixture-of-Transformers."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from omnimoe.config import ConfigError
from omnimoe.experts.base import Experts, check_network, register_experts
from omnimoe.layers import RowLayout, TowerMap, num_copies, resolve_towers
from omnimoe.layers.uneven import UnevenMLP, copy_widths, mlp_bank
from omnimoe.routers import Routing


@register_experts("feed_forward")
class FeedForward(Experts):
    """SwiGLU through the copy of the row's key."""

    @dataclass(frozen=True, kw_only=True)
    class Config(Experts.Config):
        """A feed-forward network, one copy a tower."""

        intermediate_size: int = 1024
        """Width F of a copy."""
        intermediate_sizes: tuple[int, ...] = ()
        """Width of each copy, where they differ; empty for ``intermediate_size`` everywhere."""
        activation: str = "silu"
        """A name of ``omnimoe.ops.ACTIVATIONS``."""
        gated: bool = True
        """Multiply by the activated gate."""
        bias: bool = False
        """A bias after each product."""
        towers: TowerMap = "shared"
        """The copy each key's rows meet."""

        def __post_init__(self) -> None:
            super().__post_init__()
            for width in (self.intermediate_size, *self.intermediate_sizes):
                check_network(width, self.activation, self.gated)

        @property
        def needs_key_order(self) -> bool:
            return self.towers != "shared"

        @property
        def tp_plan(self) -> dict[str, str]:
            return {} if self.intermediate_sizes or self.bias else {"experts": "bank_mlp"}

        def active_params(self, hidden_size: int, modality: int) -> float:
            width = self.intermediate_size
            if self.intermediate_sizes:
                towers = self.towers if isinstance(self.towers, tuple) else resolve_towers(self.towers, modality + 1)
                width = self.intermediate_sizes[towers[modality]]
            return (3 if self.gated else 2) * hidden_size * width

    def __init__(
        self,
        config: FeedForward.Config,
        *,
        hidden_size: int,
        num_modalities: int,
        layer_idx: int,
        widths: tuple[int, ...] = (),
    ) -> None:
        super().__init__()
        self.towers = resolve_towers(config.towers, num_modalities)
        copies = num_copies(self.towers)
        if len(config.intermediate_sizes) not in (0, copies):
            raise ConfigError(
                f"intermediate_sizes {config.intermediate_sizes} has {len(config.intermediate_sizes)} entries for "
                f"{copies} copies; give one a copy"
            )
        self.experts = mlp_bank(
            self.towers,
            copy_widths("the feed-forward network", self.towers, hidden_size, widths),
            config.intermediate_sizes or config.intermediate_size,
            hidden_size,
            activation=config.activation,
            gated=config.gated,
            bias=config.bias,
        )

    def forward(self, x: Tensor, rows: RowLayout) -> tuple[Tensor, Routing | None]:
        """``(N, D)`` rows to ``(N, D)``, and no routing, since none was learned."""
        if isinstance(self.experts, UnevenMLP):
            return self.experts(x, rows), None
        if num_copies(self.towers) == 1:  # an adapter may stand in the place of the bank
            return self.experts(x, torch.full((1,), len(x), dtype=torch.int32, device=x.device)), None
        ends, copies = rows.segments(self.towers)
        return self.experts(x, ends, copies), None

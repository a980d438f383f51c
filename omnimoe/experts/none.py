"""No experts: a layer that mixes positions and does nothing else, as Mamba's."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from omnimoe.experts.base import Experts, register_experts
from omnimoe.layers import RowLayout
from omnimoe.routers import Routing


@register_experts("none")
class NoExperts(Experts):
    """Adds nothing to the rows; a layer that has it has one norm."""

    @dataclass(frozen=True, kw_only=True)
    class Config(Experts.Config):
        """Nothing to choose."""

        @property
        def needs_key_order(self) -> bool:
            return False

        @property
        def is_absent(self) -> bool:
            return True

        def active_params(self, hidden_size: int, modality: int) -> float:
            return 0

    def __init__(
        self,
        config: NoExperts.Config,
        *,
        hidden_size: int,
        num_modalities: int,
        layer_idx: int,
        widths: tuple[int, ...] = (),
    ) -> None:
        super().__init__()

    def forward(self, x: Tensor, rows: RowLayout) -> tuple[Tensor, Routing | None]:
        """``(N, D)`` rows to zeros, and no routing."""
        return torch.zeros_like(x), None

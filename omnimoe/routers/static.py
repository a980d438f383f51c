"""Static routing: the expert of a row is known before anything is computed."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from omnimoe.config import ConfigError
from omnimoe.layers import RowLayout
from omnimoe.routers.base import Router, Routing, register_router


@register_router("static")
class StaticRouter(Router):
    """The expert of a row is the expert of its key: modality, role, task."""

    @dataclass(frozen=True, kw_only=True)
    class Config(Router.Config):
        """Static routing by key."""

        experts_of_keys: tuple[int, ...] = ()
        """The expert of each key; expert i for key i where empty."""

        @property
        def needs_key_order(self) -> bool:
            return False

    def __init__(self, config: StaticRouter.Config, *, hidden_size: int, num_experts: int, num_modalities: int) -> None:
        super().__init__()
        chosen = config.experts_of_keys or tuple(range(num_modalities))
        if len(chosen) != num_modalities or min(chosen) < 0 or max(chosen) >= num_experts:
            raise ConfigError(
                f"experts_of_keys {chosen} must name one of {num_experts} experts for each of {num_modalities} keys"
            )
        self.experts_of_keys = chosen

    def forward(self, x: Tensor, rows: RowLayout) -> Routing:
        """``(N, D)`` rows; one entry a row, weight one."""
        table = torch.tensor(self.experts_of_keys, device=x.device)
        return Routing(torch.arange(len(x), device=x.device), table[rows.key_ids], x.new_ones(len(x)))

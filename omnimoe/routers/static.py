"""Static routing: the experts of a row are known before anything is computed."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from omnimoe.config import ConfigError
from omnimoe.layers import RowLayout
from omnimoe.routers.base import Router, Routing, register_router

COMBINES = ("mean", "sum")


@register_router("static")
class StaticRouter(Router):
    """The experts of a row are those of its key: a modality, a role, a task; or the set of skills that it needs.

    Source: sets of skills as in SkillNet, https://arxiv.org/abs/2205.06126.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config(Router.Config):
        """Static routing by key."""

        experts_of_keys: tuple[int | tuple[int, ...], ...] = ()
        """The expert of each key, or the set of its experts; expert i for key i where empty."""
        combine: str = "mean"
        """Outputs of a set are averaged, ``"mean"``, or added, ``"sum"``."""

        def __post_init__(self) -> None:
            super().__post_init__()
            if self.combine not in COMBINES:
                raise ConfigError(f"unknown combine {self.combine!r}; known: {', '.join(COMBINES)}")

        @property
        def needs_key_order(self) -> bool:
            return False

        def experts_per_token(self, num_experts: int, modality: int) -> float:
            return float(len(self.reached_experts(num_experts, modality)))

        def most_experts_per_token(self, num_experts: int) -> int:
            return max((len(_as_set(chosen)) for chosen in self.experts_of_keys), default=1)

        def reached_experts(self, num_experts: int, modality: int) -> tuple[int, ...]:
            return _as_set(self.experts_of_keys[modality] if self.experts_of_keys else modality)

    def __init__(self, config: StaticRouter.Config, *, hidden_size: int, num_experts: int, num_modalities: int) -> None:
        super().__init__()
        given = config.experts_of_keys or tuple(range(num_modalities))
        sets = [_as_set(chosen) for chosen in given]
        named = [expert for chosen in sets for expert in chosen]
        if len(sets) != num_modalities or not all(sets) or min(named) < 0 or max(named) >= num_experts:
            raise ConfigError(
                f"experts_of_keys {given} must name one of {num_experts} experts for each of {num_modalities} keys, "
                "or a set of them"
            )
        if any(len(set(chosen)) < len(chosen) for chosen in sets):
            raise ConfigError(f"experts_of_keys {config.experts_of_keys} names an expert twice in one set")
        most = max(len(chosen) for chosen in sets)
        self.experts_of_keys = tuple(chosen + (-1,) * (most - len(chosen)) for chosen in sets)
        self.weights_of_keys = tuple(1 / len(chosen) if config.combine == "mean" else 1.0 for chosen in sets)

    def forward(self, x: Tensor, rows: RowLayout) -> Routing:
        """``(N, D)`` rows; as many entries a row as the largest set has experts, weight one or one over the set."""
        table = torch.tensor(self.experts_of_keys, device=x.device)
        weights = torch.tensor(self.weights_of_keys, device=x.device, dtype=x.dtype)
        most = table.shape[1]
        token_index = torch.arange(len(x), device=x.device).repeat_interleave(most)
        expert_ids = table[rows.key_ids].reshape(-1)
        return Routing(token_index, expert_ids, weights[rows.key_ids].repeat_interleave(most))


def _as_set(chosen: int | tuple[int, ...]) -> tuple[int, ...]:
    return tuple(chosen) if isinstance(chosen, tuple | list) else (chosen,)

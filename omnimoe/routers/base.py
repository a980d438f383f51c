"""What a router is asked and what it answers."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from torch import Tensor, nn

from omnimoe.config import Config as ConfigBase
from omnimoe.config import Configurable, register
from omnimoe.registry import Registry

ROUTERS: Registry = Registry("router")


def register_router(name: str, *, exist_ok: bool = False):
    """Decorator that files a :class:`Router` class under ``name``."""
    return register(ROUTERS, name, exist_ok=exist_ok)


@dataclass(frozen=True)
class Routing:
    """Which expert takes which row, one entry a routed row, so that every kind of routing has one form.

    Args:
        token_index: ``(R,)`` int64 into the N rows.
        expert_ids: ``(R,)`` int64 into the E experts.
        expert_weights: ``(R,)`` floating point, what the expert's output is multiplied by.
        router_logits: ``(N, E)`` float32 before the score function; minus infinity where an expert is out of reach.
            None where nothing was computed.
        losses: balance losses by name, scalars, already times their coefficient.
        cutoff: ``(E,)`` float32, the lowest score each expert took, where experts choose; see ``expert_choice``.
        spans: ``(start, stop)`` of each group's rows, where a router is made of one router a group of rows.
    """

    token_index: Tensor
    expert_ids: Tensor
    expert_weights: Tensor
    router_logits: Tensor | None = None
    losses: dict[str, Tensor] = field(default_factory=dict)
    cutoff: Tensor | None = None
    spans: tuple[tuple[int, int], ...] = ()


class Router(nn.Module, Configurable):
    """Sends rows to experts.

    Contract: ``__init__(config, *, hidden_size, num_experts, num_modalities)`` and ``forward(x (N, D), rows) ->
    Routing``. ``num_modalities`` is the number of keys a row may have: the modalities, unless the model is given other
    ``keys``. ``rows.key_ids`` and ``rows.modality_ids``, ``(N,)`` each, are there to be used. A router that
    looks at other rows than the one it routes sets :attr:`is_causal` to False, and must route by the row alone where
    ``rows.routes_causally`` asks for it.
    """

    registry: ClassVar[Registry] = ROUTERS
    is_causal: ClassVar[bool] = True

    @dataclass(frozen=True, kw_only=True)
    class Config(ConfigBase):
        """Nothing to choose."""

        @property
        def needs_key_order(self) -> bool:
            """Whether rows must come in key order."""
            return True

        @property
        def is_causal(self) -> bool:
            """Whether a row's routing depends on that row alone."""
            return bool(getattr(self.target, "is_causal", False))

        def experts_per_token(self, num_experts: int, modality: int) -> float:
            """Experts that a token of ``modality`` meets on average, for counting FLOPs."""
            return 1.0

        def router_params(self, hidden_size: int, num_experts: int, modality: int | None = None) -> int:
            """Weights of the router, all of them or those that a token of ``modality`` meets, for counting."""
            return 0

    def initial_buffers(self) -> dict[str, Tensor]:
        """How each own buffer starts, by name, for a model that was built without memory."""
        return {}

    def update(self, routing: Routing) -> None:
        """Takes in what a training step routed, for routers that adapt outside of the gradient; by default nothing."""

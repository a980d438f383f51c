"""What a block calls in the place of its feed-forward network."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from omnimoe.config import Config as ConfigBase
from omnimoe.config import ConfigError, Configurable, register
from omnimoe.ops import ACTIVATIONS, GATED
from omnimoe.registry import Registry
from omnimoe.routers import Routing

EXPERTS: Registry = Registry("experts")


def register_expert(name: str, *, exist_ok: bool = False):
    """Decorator that files an :class:`Experts` class under ``name``."""
    return register(EXPERTS, name, exist_ok=exist_ok)


register_experts = register_expert
"""The same by the name of the class."""


def check_network(intermediate_size: int, activation: str, gated: bool = True) -> None:
    """Refuses a width or an activation that no network can have.

    Raises:
        ConfigError: with the value.
    """
    if intermediate_size < 1:
        raise ConfigError(f"intermediate_size must be at least 1, got {intermediate_size}")
    known = GATED if gated else ACTIVATIONS
    if activation not in known:
        raise ConfigError(f"unknown activation {activation!r}; known: {', '.join(known)}")


class Experts(nn.Module, Configurable):
    """Works on rows one by one, with or without a router.

    Contract: ``__init__(config, *, hidden_size, num_modalities, layer_idx)`` and
    ``forward(x (N, D), rows) -> (y (N, D), Routing or None)``. ``num_modalities`` is the number of keys a row may have:
    the modalities, unless the model is given other ``keys``. A router kept as ``self.router`` is updated by
    :meth:`update`; experts with several, or with none and something else to adapt, define that method.
    """

    registry: ClassVar[Registry] = EXPERTS

    @dataclass(frozen=True, kw_only=True)
    class Config(ConfigBase):
        """Nothing to choose."""

        @property
        def needs_key_order(self) -> bool:
            """Whether rows must come in key order."""
            return True

        @property
        def is_causal(self) -> bool:
            """Whether a row's output depends on that row alone."""
            return True

        @property
        def has_causal_form(self) -> bool:
            """Whether that can be asked for, ``rows.routes_causally``, as generation does."""
            return self.is_causal

        @property
        def is_absent(self) -> bool:
            """Whether there are none, so that the layer ends with what mixes positions."""
            return False

        @property
        def num_token_ids(self) -> int:
            """Token ids that it can look up, where it reads ``rows.token_ids``; 0 where it does not."""
            return 0

        @property
        def tp_plan(self) -> dict[str, str]:
            """How tensor parallelism splits the parts inside, name to style; what is not named lies on every rank."""
            return {}

        @property
        def ep_plan(self) -> dict[str, str]:
            """How expert parallelism does; empty where no router chooses."""
            return {}

        def active_params(self, hidden_size: int, modality: int) -> float | None:
            """Weights in matrix products that a token of ``modality`` meets on average; None where unknown."""
            return None

    def update(self, routing: Routing) -> None:
        """Takes in what a training step routed, after the optimizer's step; by default ``self.router`` does, if there
        is one.

        Args:
            routing: what :meth:`forward` returned in that step.
        """
        router = getattr(self, "router", None)
        if router is not None:
            router.update(routing)

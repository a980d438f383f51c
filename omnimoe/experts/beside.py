"""What stands beside the experts of a bank: shared ones that every row meets, and free ones that compute little."""

from __future__ import annotations

from typing import Any, Protocol

from omnimoe.config import ConfigError
from omnimoe.routers import Router

SHARED_GATES = ("none", "sigmoid", "softmax")


class Beside(Protocol):
    """A config of experts with others beside them."""

    @property
    def num_shared_experts(self) -> int:
        """Experts that every row meets."""

    @property
    def shared_gate(self) -> str:
        """A name of :data:`SHARED_GATES`."""

    @property
    def router(self) -> Router.Config:
        """Above the experts."""

    @property
    def free_experts(self) -> tuple[str, ...]:
        """The kind of each expert behind the bank's."""

    @property
    def num_gated_experts(self) -> int:
        """Shared experts that the router gives weights to."""


def check_beside(config: Beside) -> None:
    """Refuses what a router cannot have beside its experts.

    Raises:
        ConfigError: with the value, or the router, and what to do.
    """
    for name in ("num_shared_experts", "num_zero_experts", "num_identity_experts", "num_constant_experts"):
        if getattr(config, name, 0) < 0:
            raise ConfigError(f"{name} must be at least 0, got {getattr(config, name)}")
    if config.shared_gate not in SHARED_GATES:
        raise ConfigError(f"unknown shared_gate {config.shared_gate!r}; known: {', '.join(SHARED_GATES)}")
    if config.shared_gate != "none" and not config.num_shared_experts:
        raise ConfigError(f"shared_gate {config.shared_gate!r} gates nothing; set num_shared_experts")
    router = type(config.router).__qualname__
    if (config.free_experts or config.num_gated_experts) and not config.router.takes_free_experts:
        raise ConfigError(
            f"{router} chooses among the experts of the bank alone; drop zero, identity and constant experts and "
            "shared_gate='softmax', or take TopKRouter"
        )
    if config.num_gated_experts and not config.router.takes_gated_experts:
        raise ConfigError(
            f"shared_gate='softmax' is a part of a softmax over what is chosen, and {router} as it is set has none; "
            "give a learned router with score='softmax', normalize=True, or take shared_gate='sigmoid'"
        )


def given_beside(config: Beside) -> dict[str, Any]:
    """What the router is told of them when it is built; nothing where there are none."""
    if not (config.free_experts or config.num_gated_experts):
        return {}
    return {"free_experts": config.free_experts, "num_gated_experts": config.num_gated_experts}


__all__ = ["SHARED_GATES", "check_beside", "given_beside"]

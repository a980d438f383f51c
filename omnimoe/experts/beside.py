"""What configs of experts under a router share: what the router says of them, and what stands beside the bank."""

from __future__ import annotations

from typing import Any

from omnimoe.config import ConfigError
from omnimoe.routers import Router

SHARED_GATES = ("none", "sigmoid", "softmax")


class UnderRouter:
    """Put in front of a part's config that has these fields."""

    num_experts: int
    router: Router.Config
    num_shared_experts: int
    shared_gate: str

    @property
    def free_experts(self) -> tuple[str, ...]:
        """The kind of each expert behind the bank's."""
        raise NotImplementedError

    @property
    def num_gated_experts(self) -> int:
        """Shared experts that the router gives weights to."""
        return self.num_shared_experts if self.shared_gate == "softmax" else 0

    @property
    def num_scored_experts(self) -> int:
        """Experts that the router has a score for."""
        return self.num_experts + len(self.free_experts) + self.num_gated_experts

    @property
    def is_causal(self) -> bool:
        """Whether a row's routing depends on that row alone."""
        return self.router.is_causal

    @property
    def has_causal_form(self) -> bool:
        """Whether that can be asked for, as generation does."""
        return self.router.has_causal_form

    @property
    def num_token_ids(self) -> int:
        """Token ids that the router can look up."""
        return self.router.num_token_ids

    def check_beside(self) -> None:
        """Refuses what a router cannot have beside its experts.

        Raises:
            ConfigError: with the value, or the router, and what to do.
        """
        for name in ("num_shared_experts", "num_zero_experts", "num_identity_experts", "num_constant_experts"):
            if getattr(self, name, 0) < 0:
                raise ConfigError(f"{name} must be at least 0, got {getattr(self, name)}")
        if self.shared_gate not in SHARED_GATES:
            raise ConfigError(f"unknown shared_gate {self.shared_gate!r}; known: {', '.join(SHARED_GATES)}")
        if self.shared_gate != "none" and not self.num_shared_experts:
            raise ConfigError(f"shared_gate {self.shared_gate!r} gates nothing; set num_shared_experts")
        router = type(self.router).__qualname__
        if (self.free_experts or self.num_gated_experts) and not self.router.takes_free_experts:
            raise ConfigError(
                f"{router} chooses among the experts of the bank alone; drop zero, identity and constant experts and "
                "shared_gate='softmax', or take TopKRouter"
            )
        if self.num_gated_experts and not self.router.takes_gated_experts:
            raise ConfigError(
                f"shared_gate='softmax' is a part of a softmax over what is chosen, and {router} as it is set has "
                "none; give a learned router with score='softmax', normalize=True, or take shared_gate='sigmoid'"
            )

    def given_beside(self) -> dict[str, Any]:
        """What the router is told of them when it is built; nothing where there are none."""
        if not (self.free_experts or self.num_gated_experts):
            return {}
        return {"free_experts": self.free_experts, "num_gated_experts": self.num_gated_experts}


__all__ = ["SHARED_GATES", "UnderRouter"]

"""What keeps a learned router balanced: losses, and a bias outside of the gradient.

A coefficient of 0 leaves a loss out. All of them stand in one config, so that every learned router spells them alike.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from omnimoe.config import ConfigError
from omnimoe.layers import RowLayout
from omnimoe.routers.base import Router, Routing
from omnimoe.routers.losses import (
    LOAD_BALANCE_FORMS,
    all_ranks,
    entropy_losses,
    importance_loss,
    load_balance_loss,
    load_loss,
    mutual_information,
    orthogonality_loss,
    router_z_loss,
)

SCOPES = ("batch", "sequence", "ranks")
BIASES = ("none", "shared", "key")
UPDATES = ("sign", "proportional")
LOSS_COEFS = (
    "load_balance_coef",
    "z_loss_coef",
    "importance_coef",
    "load_coef",
    "local_entropy_coef",
    "global_entropy_coef",
    "orthogonality_coef",
    "mutual_information_coef",
)


@dataclass(frozen=True, kw_only=True)
class BalanceConfig(Router.Config):
    """Losses and the selection bias."""

    load_balance_coef: float = 0.0
    """Coefficient of the load-balance loss."""
    load_balance_form: str = "choices"
    """How load is counted, so that a published coefficient means what it meant: ``"choices"``, ``"choices_per_token"``
    (transformers) or ``"first_choice"`` (GShard)."""
    load_balance_scope: str = "batch"
    """Where balance is asked for: over the ``"batch"``, in each ``"sequence"``, or over the batches of all ``"ranks"``,
    the global batch."""
    load_balance_by_key: bool = False
    """Whether it is asked for among the rows of each key."""
    z_loss_coef: float = 0.0
    """Coefficient of the router z-loss."""
    importance_coef: float = 0.0
    """Coefficient of V-MoE's importance loss."""
    load_coef: float = 0.0
    """Coefficient of V-MoE's load loss, which needs ``noise``."""
    local_entropy_coef: float = 0.0
    """Coefficient of LIMoE's local term: a row is to be sure of its expert."""
    global_entropy_coef: float = 0.0
    """Coefficient of LIMoE's global term: a key is to use several experts."""
    global_entropy_experts: float | None = None
    """As many experts a key satisfy the global term; None for all."""
    entropy_keys: tuple[int, ...] = ()
    """The keys that LIMoE's terms are for; all where empty."""
    orthogonality_coef: float = 0.0
    """Coefficient of ERNIE's loss, that experts look in directions at right angles."""
    mutual_information_coef: float = 0.0
    """Coefficient of the mutual information of key and expert, which is subtracted from the loss."""
    expert_bias: str = "none"
    """A number for each expert that is added to its score for the choice, never for the weight, and that
    ``update_routers`` moves against its load: ``"none"``, ``"shared"``, or one for each ``"key"``."""
    expert_bias_rate: float = 0.001
    """Size of the bias's step."""
    expert_bias_update: str = "sign"
    """``"sign"``: up or down by the rate (DeepSeek-V3); ``"proportional"``: by the rate times what is missing from the
    expert's share of choices (LongCat-Flash)."""
    expert_bias_target: float | None = None
    """Experts of the bank that a token is to take under the proportional update, where others are free; None for their
    even share."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, known in (
            ("load_balance_form", LOAD_BALANCE_FORMS),
            ("load_balance_scope", SCOPES),
            ("expert_bias", BIASES),
            ("expert_bias_update", UPDATES),
        ):
            if getattr(self, name) not in known:
                raise ConfigError(f"unknown {name} {getattr(self, name)!r}; known: {', '.join(known)}")
        self.check_not_negative(*LOSS_COEFS, "expert_bias_rate")
        wanted = self.global_entropy_experts
        if wanted is not None and not 1 <= wanted < math.inf:
            raise ConfigError(f"global_entropy_experts must be at least 1, got {wanted}; None asks for all")
        if self.expert_bias_target is not None and not 0 < self.expert_bias_target < math.inf:
            raise ConfigError(
                f"expert_bias_target must be positive, got {self.expert_bias_target}; None is an even share"
            )


class BalancedRouter(Router):
    """Base of routers that choose for each row by scores of all experts."""

    expert_bias: Tensor | None

    @dataclass(frozen=True, kw_only=True)
    class Config(BalanceConfig):
        """Losses and the selection bias."""

    def __init__(self, config: BalancedRouter.Config, *, num_experts: int, num_free: int, num_keys: int) -> None:
        super().__init__()
        self.config = config
        self.num_experts, self.num_free, self.num_keys = num_experts, num_free, num_keys
        if max(config.entropy_keys, default=0) >= num_keys or min(config.entropy_keys, default=0) < 0:
            raise ConfigError(f"entropy_keys {config.entropy_keys} must be among the {num_keys} keys, counted from 0")
        if (config.global_entropy_experts or 0) > num_experts + num_free:
            raise ConfigError(
                f"global_entropy_experts {config.global_entropy_experts} is more than the {num_experts + num_free} "
                "experts that there are; None asks for all"
            )
        self.register_buffer("expert_bias", self.initial_buffers().get("expert_bias"))

    def initial_buffers(self) -> dict[str, Tensor]:
        """The bias starts at zero."""
        if self.config.expert_bias == "none":
            return {}
        rows = (self.num_keys,) if self.config.expert_bias == "key" else ()
        return {"expert_bias": torch.zeros(*rows, self.num_experts + self.num_free, dtype=torch.float32)}

    def biased(self, scores: Tensor, rows: RowLayout) -> Tensor:
        """The ``(N, E)`` scores that the choice is made by; no gradient reaches the bias."""
        if self.expert_bias is None:
            return scores
        return scores + (self.expert_bias[rows.key_ids] if self.config.expert_bias == "key" else self.expert_bias)

    def balance_losses(
        self, probs: Tensor, logits: Tensor, noisy: Tensor, chosen: Tensor, weight: Tensor, rows: RowLayout
    ) -> dict[str, Tensor]:
        """The losses that have a coefficient, times it.

        Args:
            probs: ``(N, E)`` float32, sums to one over experts.
            logits: ``(N, E)`` float32, without noise.
            noisy: ``(N, E)`` float32, with it.
            chosen: ``(N, K)`` int64, the best first, before any was dropped; -1 for none.
            weight: ``(E, D)`` of the router.
            rows: their layout.
        """
        config, keys, counted = self.config, rows.key_ids, rows.counted
        found: dict[str, Tensor] = {}

        def add(name: str, coef: float, loss: Tensor) -> None:
            found[name] = coef * loss

        if config.load_balance_coef:
            groups, num_groups = self._groups(rows)
            loss = load_balance_loss(
                probs,
                chosen.reshape(-1),
                chosen.shape[1],
                form=config.load_balance_form,
                groups=groups,
                num_groups=num_groups,
                counted=counted,
                across_ranks=config.load_balance_scope == "ranks",
            )
            add("load_balance", config.load_balance_coef, loss)
        if config.z_loss_coef:
            add("router_z", config.z_loss_coef, router_z_loss(logits, counted))
        if config.importance_coef:
            add("importance", config.importance_coef, importance_loss(probs, counted))
        if config.load_coef:
            noise = getattr(config, "noise", 0.0)
            add("load", config.load_coef, load_loss(logits, noisy, chosen.shape[1], noise, counted))
        if config.local_entropy_coef or config.global_entropy_coef:
            asked = counted
            if config.entropy_keys:
                asked = torch.isin(keys, torch.tensor(config.entropy_keys, device=keys.device))
                asked = asked if counted is None else asked & counted
            wanted = config.global_entropy_experts or probs.shape[1]
            local, overall = entropy_losses(probs, keys, self.num_keys, wanted, asked)
            add("local_entropy", config.local_entropy_coef, local)
            add("global_entropy", config.global_entropy_coef, overall)
        if config.orthogonality_coef:
            add("orthogonality", config.orthogonality_coef, orthogonality_loss(weight))
        if config.mutual_information_coef:
            known = mutual_information(probs, keys, self.num_keys, counted)
            add("mutual_information", -config.mutual_information_coef, known)
        return found

    def _groups(self, rows: RowLayout) -> tuple[Tensor | None, int]:
        """The group of each row inside which balance is asked for, and how many there are."""
        groups, count = None, 1
        if self.config.load_balance_scope == "sequence":
            groups, count = rows.sequence_ids(), rows.batch_size
        if self.config.load_balance_by_key:
            groups = rows.key_ids if groups is None else groups * self.num_keys + rows.key_ids
            count *= self.num_keys
        return groups, count

    @torch.no_grad()
    def update(self, routing: Routing) -> None:
        """Moves the bias against the load of all ranks; that of free experts stays, for they need no balance."""
        if self.expert_bias is None:
            return
        bias = self.expert_bias if self.expert_bias.ndim == 2 else self.expert_bias.unsqueeze(0)
        keys = torch.zeros_like(routing.token_index)
        if len(bias) > 1 and routing.key_ids is not None:
            keys = routing.key_ids[routing.token_index]
        taken = routing.expert_ids >= 0
        cells = keys[taken] * bias.shape[1] + routing.expert_ids[taken]
        load = all_ranks(torch.bincount(cells, minlength=bias.numel()).view(bias.shape).to(bias))
        own = load[:, : self.num_experts]
        if self.config.expert_bias_update == "sign":
            step = (own.mean(-1, keepdim=True) - own).sign()
        else:
            total = load.sum(-1, keepdim=True)
            wanted = 1 / (self.num_experts + self.num_free)
            if self.config.expert_bias_target is not None:
                wanted = self.config.expert_bias_target / (self.choices_per_token() * self.num_experts)
            step = torch.where(total > 0, wanted - own / total.clamp_min(1), torch.zeros_like(own))
        bias[:, : self.num_experts] += self.config.expert_bias_rate * step

    def choices_per_token(self) -> int:
        """Choices of a row, free experts included."""
        raise NotImplementedError(f"{type(self).__qualname__} must say how many experts a row chooses")

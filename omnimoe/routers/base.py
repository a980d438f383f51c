"""What a router is asked and what it answers."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Self

import torch
from torch import Tensor, nn
from torch.utils._pytree import register_dataclass

from omnimoe.config import Config as ConfigBase
from omnimoe.config import ConfigError, Configurable, register
from omnimoe.layers import RowLayout
from omnimoe.registry import Registry

ROUTERS: Registry = Registry("router")


def register_router(name: str, *, exist_ok: bool = False):
    """Decorator that files a :class:`Router` class under ``name``."""
    return register(ROUTERS, name, exist_ok=exist_ok)


@dataclass(frozen=True)
class Slots:
    """What experts get in the place of rows, where a router mixes rows: S mixtures an expert and sequence.

    Args:
        dispatch: ``(B, E, S, T)``, the share of each position in a slot.
        combine: ``(B, T, E, S)``, the share of each slot in what a position gets.
    """

    dispatch: Tensor
    combine: Tensor

    def through(self, bank: Callable[[Tensor, Tensor], Tensor], x: Tensor, rows: RowLayout) -> Tensor:
        """Rows through a bank by way of the slots.

        Args:
            bank: takes ``(R, D)`` rows in runs and ``(E,)`` int32, the end of each expert's run, to ``(R, F)``.
            x: ``(N, D)`` rows.
            rows: their layout.

        Returns:
            ``(N, F)``.
        """
        batch_size, count, num_slots, _ = self.dispatch.shape
        mixed = self.dispatch.flatten(1, 2) @ rows.to_time(x)  # (B, E * S, D)
        mixed = mixed.unflatten(1, (count, num_slots)).transpose(0, 1).flatten(0, 2)
        ends = torch.arange(1, count + 1, device=x.device, dtype=torch.int32) * (batch_size * num_slots)
        worked = bank(mixed, ends)
        worked = worked.view(count, batch_size, num_slots, worked.shape[1]).transpose(0, 1).flatten(1, 2)
        return rows.to_rows(self.combine.flatten(2) @ worked)


register_dataclass(Slots, serialized_type_name="omnimoe.Slots")


@dataclass(frozen=True)
class Routing:
    """Which expert takes which row, one entry a routed row, so that every kind of routing has one form.

    Args:
        token_index: ``(R,)`` int64 into the N rows.
        expert_ids: ``(R,)`` int64 into the E experts, then the free ones (see :class:`Router`); -1 for an entry without
            an expert: a choice that was dropped, or one that the row did not need.
        expert_weights: ``(R,)`` floating point, what the expert's output is multiplied by.
        router_logits: ``(N, E)`` float32 before the score function, free experts included; minus infinity where an
            expert is out of reach. None where nothing was computed.
        losses: balance losses by name, scalars, already times their coefficient.
        cutoff: ``(E,)`` float32, the lowest score each expert took, where experts choose; see ``expert_choice``.
        spans: ``(start, stop)`` of each group's rows, where a router is made of one router a group of rows.
        key_ids: ``(N,)`` int64, the key of each row, where :meth:`Router.update` asks for it.
        shared_weights: ``(N, S)``, the weights of shared experts, where they take part in the router's softmax.
        dropped: int64 scalar, choices that found no room; None where a router never drops.
        slots: where a router mixes rows, what experts get; entries then say what each row gets of each expert.
    """

    token_index: Tensor
    expert_ids: Tensor
    expert_weights: Tensor
    router_logits: Tensor | None = None
    losses: dict[str, Tensor] = field(default_factory=dict)
    cutoff: Tensor | None = None
    spans: tuple[tuple[int, int], ...] = ()
    key_ids: Tensor | None = None
    shared_weights: Tensor | None = None
    dropped: Tensor | None = None
    slots: Slots | None = None


register_dataclass(Routing, serialized_type_name="omnimoe.Routing")


def join_routings(steps: Sequence[Sequence[Routing | None]]) -> tuple[Routing | None, ...]:
    """The routings of several batches as if they had been one, for an update after a step over all of them.

    Nothing in it has a gradient, and losses are left out; a cut-off is the mean over the batches that have one.

    Args:
        steps: for each batch, the routing of each layer.

    Returns:
        The routing of each layer; that of the batch itself where there is but one.
    """
    if len(steps) == 1:
        return tuple(steps[0])
    return tuple(_joined([routing for routing in layer if routing is not None]) for layer in zip(*steps, strict=True))


def _joined(parts: list[Routing]) -> Routing | None:
    if len(parts) < 2:
        return parts[0] if parts else None
    keys = [part.key_ids for part in parts if part.key_ids is not None]
    logits = [part.router_logits.detach() for part in parts if part.router_logits is not None]
    token_index, first = [], 0
    for part in parts:
        token_index.append(part.token_index + first)
        first += next((len(held) for held in (part.key_ids, part.router_logits) if held is not None), 0)
    cutoffs = [part.cutoff for part in parts if part.cutoff is not None]
    return Routing(
        torch.cat(token_index),
        torch.cat([part.expert_ids for part in parts]),
        torch.cat([part.expert_weights.detach() for part in parts]),
        torch.cat(logits) if len(logits) == len(parts) else None,
        cutoff=torch.stack(cutoffs).nanmean(0) if cutoffs else None,
        key_ids=torch.cat(keys) if len(keys) == len(parts) else None,
    )


class Router(nn.Module, Configurable):
    """Sends rows to experts.

    Contract: ``__init__(config, *, hidden_size, num_experts, num_modalities)`` and ``forward(x (N, D), rows) ->
    Routing``. ``num_modalities`` is the number of keys a row may have: the modalities, unless the model is given other
    ``keys``. ``rows.key_ids`` and ``rows.modality_ids``, ``(N,)`` each, are there to be used. A router that
    looks at other rows than the one it routes sets :attr:`is_causal` to False; where ``rows.routes_causally`` asks for
    it, it must route by the row alone, or say by :attr:`Config.has_causal_form` that it cannot.

    A router whose config says :attr:`Config.takes_free_experts` is also given ``free_experts``, the kinds of experts
    behind the bank's that cost nothing (``"zero"``, ``"identity"``, ``"constant"``), their ids E, E + 1, ..., and
    where it says :attr:`Config.takes_gated_experts`, ``num_gated_experts`` S, shared experts that it gives weights to;
    both only where there are some.
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

        @property
        def has_causal_form(self) -> bool:
            """Whether it can route a row by that row alone where that is asked for, as generation does."""
            return self.is_causal

        @property
        def num_token_ids(self) -> int:
            """Token ids that it can look up, where it reads ``rows.token_ids``; 0 where it does not."""
            return 0

        @property
        def takes_free_experts(self) -> bool:
            """Whether it may be given free experts beside the bank's."""
            return False

        @property
        def takes_gated_experts(self) -> bool:
            """Whether it may be given shared experts, to weigh them together with what it chose."""
            return self.takes_free_experts

        @property
        def mixes_rows(self) -> bool:
            """Whether it answers with :class:`Slots`, mixtures of rows, rather than with rows of its choice."""
            return False

        def check_idle(self, why: str, *names: str) -> None:
            """Refuses fields that another router of the same base has a use for and this one has none.

            Raises:
                ConfigError: with ``why`` and those that are not as they are by default, with their values.
            """
            usual = {field.name: field.default for field in dataclasses.fields(self)}
            idle = [f"{name}={getattr(self, name)!r}" for name in names if getattr(self, name) != usual[name]]
            if idle:
                raise ConfigError(f"{why}, so {', '.join(idle)} would do nothing; leave it out")

        def experts_per_token(self, num_experts: int, modality: int) -> float | None:
            """Experts that a token of ``modality`` meets on average, for counting FLOPs; None where unknown."""
            return 1.0

        def most_experts_per_token(self, num_experts: int) -> int:
            """The most experts that a token of any modality may meet."""
            return num_experts

        def reached_experts(self, num_experts: int, modality: int) -> range | tuple[int, ...]:
            """The experts of the bank that a token of ``modality`` may be sent to, for counting where widths differ."""
            return range(num_experts)

        def router_params(self, hidden_size: int, num_experts: int, modality: int | None = None) -> int:
            """Weights of the router, all of them or those that a token of ``modality`` meets, for counting."""
            return 0

    def initial_buffers(self) -> dict[str, Tensor]:
        """How each own buffer starts, by name, for a model that was built without memory."""
        return {}

    def _apply(self, fn: Callable, recurse: bool = True) -> Self:
        super()._apply(fn, recurse)
        # a running mean or a bias of small steps stands still in low precision, so a cast of the model leaves them
        for name, buffer in self.named_buffers(recurse=False):
            if buffer.is_floating_point():
                setattr(self, name, buffer.to(torch.float32))
        return self

    def update(self, routing: Routing) -> None:
        """Takes in what a training step routed, for routers that adapt outside of the gradient; by default nothing.

        A step over several batches passes them joined (:func:`join_routings`).
        """

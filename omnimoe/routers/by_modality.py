"""Two levels: the modality of a row picks a group of experts, a learned router chooses inside the group (MoMa)."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from omnimoe.config import ConfigError
from omnimoe.layers import RowLayout
from omnimoe.routers.base import Router, Routing, register_router
from omnimoe.routers.expert_choice import ExpertChoiceRouter


@register_router("by_modality")
class ByModalityRouter(Router):
    """Any router, once a modality, each over the experts of that modality alone.

    Source: MoMa, https://arxiv.org/abs/2407.21770.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config(Router.Config):
        """A router inside every modality's group of experts."""

        experts: tuple[int, ...] = ()
        """Experts of each modality; they sum to the experts of the bank."""
        router: Router.Config = field(default_factory=ExpertChoiceRouter.Config)
        """The router inside a group."""
        gate_lone_expert: bool = False
        """Whether the only expert of a group is routed and gated too; otherwise it is a plain feed-forward network."""

        @property
        def is_causal(self) -> bool:
            return self.router.is_causal or self._plain() == set(range(len(self.experts)))

        def _plain(self) -> set[int]:
            return set() if self.gate_lone_expert else {i for i, count in enumerate(self.experts) if count == 1}

        def experts_per_token(self, num_experts: int, modality: int) -> float:
            if modality in self._plain():
                return 1.0
            return self.router.experts_per_token(self.experts[modality], modality)

        def router_params(self, hidden_size: int, num_experts: int, modality: int | None = None) -> int:
            groups = range(len(self.experts)) if modality is None else (modality,)
            return sum(
                self.router.router_params(hidden_size, self.experts[group], modality)
                for group in groups
                if group not in self._plain()
            )

    def __init__(
        self, config: ByModalityRouter.Config, *, hidden_size: int, num_experts: int, num_modalities: int
    ) -> None:
        super().__init__()
        if len(config.experts) != num_modalities or sum(config.experts) != num_experts or min(config.experts) < 1:
            raise ConfigError(
                f"experts {config.experts} must give each of {num_modalities} modalities at least one expert "
                f"and sum to the bank's {num_experts}"
            )
        self.config = config
        self.num_experts = num_experts
        self.routers = nn.ModuleList(
            None
            if modality in config._plain()
            else config.router.build(hidden_size=hidden_size, num_experts=count, num_modalities=num_modalities)
            for modality, count in enumerate(config.experts)
        )

    def forward(self, x: Tensor, rows: RowLayout) -> Routing:
        """``(N, D)`` rows in key order; entries come modality by modality."""
        if torch.compiler.is_compiling():
            return self._traced(x, rows)
        logits = x.new_full((len(x), self.num_experts), float("-inf"), dtype=torch.float32)
        losses: dict[str, Tensor] = {}
        parts, cutoffs, first = [], [], 0
        for modality, (router, (start, stop)) in enumerate(zip(self.routers, rows.key_spans(), strict=True)):
            count = self.config.experts[modality]
            if router is None:
                index = torch.arange(start, stop, device=x.device)
                parts.append((index, torch.full_like(index, first), x.new_ones(stop - start)))
                cutoffs.append(logits.new_full((count,), float("nan")))
            else:
                inner = router(x[start:stop], rows.span(modality))
                parts.append((inner.token_index + start, inner.expert_ids + first, inner.expert_weights))
                if inner.router_logits is not None:
                    logits = logits.index_put(
                        (
                            torch.arange(start, stop, device=x.device).unsqueeze(1),
                            torch.arange(first, first + count, device=x.device).unsqueeze(0),
                        ),
                        inner.router_logits,
                    )
                cutoffs.append(logits.new_full((count,), float("nan")) if inner.cutoff is None else inner.cutoff)
                for name, loss in inner.losses.items():
                    losses[name] = losses.get(name, 0) + loss * ((stop - start) / max(1, len(x)))
            first += count
        token_index, expert_ids, weights = (torch.cat(columns) for columns in zip(*parts, strict=True))
        spans = tuple(rows.key_spans())
        return Routing(token_index, expert_ids, weights, logits, losses, torch.cat(cutoffs), spans)

    def _traced(self, x: Tensor, rows: RowLayout) -> Routing:
        """The same with shapes that depend on no value: each router sees all rows, of which those of its group count,
        and another group's row is sent to no expert."""
        columns, parts, cutoffs, first = [], [], [], 0
        losses: dict[str, Tensor] = {}
        total = len(x) if rows.counted is None else rows.counted.sum().clamp_min(1)
        for modality, (router, count) in enumerate(zip(self.routers, self.config.experts, strict=True)):
            group = rows.only(modality)
            assert group.counted is not None
            if router is None:
                every = torch.arange(len(x), device=x.device)
                inner = Routing(every, torch.zeros_like(every), x.new_ones(len(x)))
            else:
                inner = router(x, group)
            taken = group.counted[inner.token_index] & (inner.expert_ids >= 0)
            expert_ids = torch.where(taken, inner.expert_ids + first, -1)
            parts.append((inner.token_index, expert_ids, inner.expert_weights))
            column = x.new_full((len(x), count), float("-inf"), dtype=torch.float32)
            if inner.router_logits is not None:
                column = torch.where(group.counted.unsqueeze(1), inner.router_logits, column)
            columns.append(column)
            cutoffs.append(column.new_full((count,), float("nan")) if inner.cutoff is None else inner.cutoff)
            for name, loss in inner.losses.items():
                losses[name] = losses.get(name, 0) + loss * (group.counted.sum() / total)
            first += count
        token_index, expert_ids, weights = (torch.cat(part) for part in zip(*parts, strict=True))
        return Routing(token_index, expert_ids, weights, torch.cat(columns, 1), losses, torch.cat(cutoffs))

    def update(self, routing: Routing) -> None:
        """Hands each group's router its own part, in rows and experts counted inside the group.

        Where the routing came from a traced graph, rows are counted in the batch.
        """
        first = 0
        num_rows = 0 if routing.router_logits is None else len(routing.router_logits)
        spans = routing.spans or ((0, num_rows),) * len(self.routers)
        for router, count, span in zip(self.routers, self.config.experts, spans, strict=True):
            if router is not None:
                router.update(_part(routing, span, slice(first, first + count)))
            first += count


def _part(routing: Routing, span: tuple[int, int], group: slice) -> Routing:
    """The entries of one group, as its own router made them; losses were summed over groups and are left out."""
    mine = (routing.expert_ids >= group.start) & (routing.expert_ids < group.stop)
    return Routing(
        routing.token_index[mine] - span[0],
        routing.expert_ids[mine] - group.start,
        routing.expert_weights[mine],
        None if routing.router_logits is None else routing.router_logits[span[0] : span[1], group],
        cutoff=None if routing.cutoff is None else routing.cutoff[group],
    )

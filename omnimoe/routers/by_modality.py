"""Two levels: the modality of a row picks a group of experts, a learned router chooses inside the group (MoMa)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

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

        def __post_init__(self) -> None:
            super().__post_init__()
            if isinstance(self.router, ByModalityRouter.Config):
                raise ConfigError(
                    f"a group is of one modality and has none to choose by, got ByModalityRouter of "
                    f"{self.router.experts} inside; give the router that stands in there"
                )
            if self.router.mixes_rows:
                name = type(self.router).__qualname__.partition(".")[0]
                raise ConfigError(
                    f"{name} keeps experts apart by key itself; take {name}.Config(experts={self.experts}) in the "
                    "place of ByModalityRouter"
                )

        @property
        def is_causal(self) -> bool:
            return self.router.is_causal or self._plain() == set(range(len(self.experts)))

        @property
        def has_causal_form(self) -> bool:
            return self.router.has_causal_form or self.is_causal

        @property
        def num_token_ids(self) -> int:
            return self.router.num_token_ids

        @property
        def takes_free_experts(self) -> bool:
            return self.router.takes_free_experts and not self._plain()

        @property
        def takes_gated_experts(self) -> bool:
            return self.router.takes_gated_experts and not self._plain()

        def _plain(self) -> set[int]:
            return set() if self.gate_lone_expert else {i for i, count in enumerate(self.experts) if count == 1}

        def experts_per_token(self, num_experts: int, modality: int) -> float | None:
            if modality in self._plain():
                return 1.0
            return self.router.experts_per_token(self._reached(num_experts, modality), modality)

        def most_experts_per_token(self, num_experts: int) -> int:
            plain = self._plain()
            most = (self.router.most_experts_per_token(count) for i, count in enumerate(self.experts) if i not in plain)
            return max(most, default=1)

        def reached_experts(self, num_experts: int, modality: int) -> range:
            first = sum(self.experts[:modality])
            return range(first, first + self.experts[modality])

        def _reached(self, num_scored: int, modality: int) -> int:
            """Experts that a group's router scores: its own, and what all groups share."""
            return self.experts[modality] + max(0, num_scored - sum(self.experts))

        def router_params(self, hidden_size: int, num_experts: int, modality: int | None = None) -> int:
            groups = range(len(self.experts)) if modality is None else (modality,)
            return sum(
                self.router.router_params(hidden_size, self._reached(num_experts, group), modality)
                for group in groups
                if group not in self._plain()
            )

    def __init__(
        self,
        config: ByModalityRouter.Config,
        *,
        hidden_size: int,
        num_experts: int,
        num_modalities: int,
        free_experts: Sequence[str] = (),
        **shared: Any,
    ) -> None:
        super().__init__()
        if len(config.experts) != num_modalities or sum(config.experts) != num_experts or min(config.experts) < 1:
            raise ConfigError(
                f"experts {config.experts} must give each of {num_modalities} modalities at least one expert "
                f"and sum to the bank's {num_experts}"
            )
        self.config = config
        self.num_experts, self.num_free = num_experts, len(free_experts)
        if free_experts:
            shared["free_experts"] = free_experts
        self.routers = nn.ModuleList(
            None
            if modality in config._plain()
            else config.router.build(
                hidden_size=hidden_size, num_experts=count, num_modalities=num_modalities, **shared
            )
            for modality, count in enumerate(config.experts)
        )

    def forward(self, x: Tensor, rows: RowLayout) -> Routing:
        """``(N, D)`` rows in key order; entries come modality by modality. Free experts are shared by all."""
        if torch.compiler.is_compiling():
            return self._traced(x, rows)
        logits = x.new_full((len(x), self.num_experts + self.num_free), float("-inf"), dtype=torch.float32)
        losses: dict[str, Tensor] = {}
        parts, cutoffs, shared, dropped, first = [], [], [], [], 0
        is_decoded = rows.routes_causally and not torch.is_grad_enabled()
        for modality, (router, (start, stop)) in enumerate(zip(self.routers, rows.key_spans(), strict=True)):
            count = self.config.experts[modality]
            if is_decoded and start == stop and len(x):
                cutoffs.append(logits.new_full((count,), float("nan")))  # a token at a time is of one modality
            elif router is None:
                index = torch.arange(start, stop, device=x.device)
                parts.append((index, torch.full_like(index, first), x.new_ones(stop - start)))
                cutoffs.append(logits.new_full((count,), float("nan")))
            else:
                inner = router(x[start:stop], rows.span(modality))
                ids = self._outside(inner.expert_ids, first, count)
                parts.append((inner.token_index + start, ids, inner.expert_weights))
                if inner.router_logits is not None and is_decoded and not self.num_free:
                    logits[start:stop, first : first + count] = inner.router_logits
                elif inner.router_logits is not None:
                    columns = self._columns(first, count, x.device).unsqueeze(0)
                    places = torch.arange(start, stop, device=x.device).unsqueeze(1)
                    logits = logits.index_put((places, columns), inner.router_logits)
                shared += [] if inner.shared_weights is None else [inner.shared_weights]
                dropped += [] if inner.dropped is None else [inner.dropped]
                cutoffs.append(logits.new_full((count,), float("nan")) if inner.cutoff is None else inner.cutoff)
                for name, loss in inner.losses.items():
                    losses[name] = losses.get(name, 0) + loss * ((stop - start) / max(1, len(x)))
            first += count
        token_index, expert_ids, weights = (torch.cat(columns) for columns in zip(*parts, strict=True))
        return Routing(
            token_index,
            expert_ids,
            weights,
            logits,
            losses,
            torch.cat(cutoffs),
            tuple(rows.key_spans()),
            key_ids=rows.key_ids,
            shared_weights=torch.cat(shared) if shared else None,
            dropped=torch.stack(dropped).sum() if dropped else None,
        )

    def _columns(self, first: int, count: int, device: torch.device) -> Tensor:
        """Ids outside of a group by the ids inside it: the group's own experts, then those that are free."""
        own = torch.arange(first, first + count, device=device)
        return torch.cat((own, torch.arange(self.num_free, device=device) + self.num_experts))

    def _outside(self, expert_ids: Tensor, first: int, count: int) -> Tensor:
        """Ids inside a group to ids outside of it; -1 stays."""
        if not first and not self.num_free:
            return expert_ids
        ids = torch.where(expert_ids >= count, expert_ids - count + self.num_experts, expert_ids + first)
        return torch.where(expert_ids < 0, -1, ids)

    def _traced(self, x: Tensor, rows: RowLayout) -> Routing:
        """The same with shapes that depend on no value: each router sees all rows, of which those of its group count,
        and another group's row is sent to no expert."""
        logits = x.new_full((len(x), self.num_experts + self.num_free), float("-inf"), dtype=torch.float32)
        parts, cutoffs, shared, dropped, first = [], [], [], [], 0
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
            ids = self._outside(inner.expert_ids, first, count)
            parts.append(
                (inner.token_index, torch.where(group.counted[inner.token_index], ids, -1), inner.expert_weights)
            )
            if inner.router_logits is not None:
                columns = self._columns(first, count, x.device)
                own = torch.where(group.counted.unsqueeze(1), inner.router_logits, logits[:, columns])
                logits = logits.index_copy(1, columns, own)
            shared += [] if inner.shared_weights is None else [inner.shared_weights * group.counted.unsqueeze(1)]
            dropped += [] if inner.dropped is None else [inner.dropped]
            cutoffs.append(logits.new_full((count,), float("nan")) if inner.cutoff is None else inner.cutoff)
            for name, loss in inner.losses.items():
                losses[name] = losses.get(name, 0) + loss * (group.counted.sum() / total)
            first += count
        token_index, expert_ids, weights = (torch.cat(part) for part in zip(*parts, strict=True))
        return Routing(
            token_index,
            expert_ids,
            weights,
            logits,
            losses,
            torch.cat(cutoffs),
            key_ids=rows.key_ids,
            shared_weights=torch.stack(shared).sum(0) if shared else None,
            dropped=torch.stack(dropped).sum() if dropped else None,
        )

    def update(self, routing: Routing) -> None:
        """Hands each group's router its own part, in rows and experts counted inside the group.

        Where the routing came from a traced graph or was joined, rows are counted in the batch.
        """
        first = 0
        num_rows = next((len(held) for held in (routing.key_ids, routing.router_logits) if held is not None), 0)
        spans = routing.spans or ((0, num_rows),) * len(self.routers)
        for key, (router, count, span) in enumerate(zip(self.routers, self.config.experts, spans, strict=True)):
            if router is not None:
                router.update(self._part(routing, key, span, first, count))
            first += count

    def _part(self, routing: Routing, key: int, span: tuple[int, int], first: int, count: int) -> Routing:
        """The entries of one group, as its own router made them; losses were summed over groups and are left out."""
        ids, keys = routing.expert_ids, routing.key_ids
        is_own = (ids >= first) & (ids < first + count)
        if keys is not None:
            is_own = keys[routing.token_index] == key
        own = ids[is_own]
        inside = torch.where(own >= self.num_experts, own - self.num_experts + count, own - first)
        columns = self._columns(first, count, ids.device)
        return Routing(
            routing.token_index[is_own] - span[0],
            torch.where(own < 0, -1, inside),
            routing.expert_weights[is_own],
            None if routing.router_logits is None else routing.router_logits[span[0] : span[1]][:, columns],
            cutoff=None if routing.cutoff is None else routing.cutoff[first : first + count],
            key_ids=None if keys is None else keys[span[0] : span[1]],
        )

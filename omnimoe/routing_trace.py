"""Records what routers do while a model runs: which experts take which tokens, how surely, and what is dropped.

    with omnimoe.record_routing(model) as trace:
        model(**batch)
    print(trace)
    trace.heatmap(by="modality", path="routing.png")

Counts stay on the model's device until they are asked for. Nothing in the model changes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from omnimoe.experts import Experts, FeedForward
from omnimoe.layers import BaseAttention, RowLayout
from omnimoe.model import OmniMoeModel
from omnimoe.plots import draw_load
from omnimoe.routers import Routing

if TYPE_CHECKING:
    from matplotlib.figure import Figure

VIEWS = ("modality", "key", "layer")
"""What :meth:`RoutingTrace.heatmap` may show load by."""


@dataclass(frozen=True, kw_only=True)
class LayerRouting:
    """What one router did, over all that was recorded.

    Args:
        layer: which.
        part: of the layer: ``"experts"``, or ``"attention"`` where the experts are in its projections.
        load: share of its choices that fell on each expert, free ones last.
        balance: entropy of the load over that of an even one: 1 where all experts are chosen alike, 0 where one is.
        busiest: load of the busiest expert of the bank over an even share of what the bank got.
        router_entropy: mean entropy of a token's probabilities over experts, in nats; None for a router without logits.
        experts_per_token: experts of the bank that a token met on average.
        dropped_share: share of the choices that found no room.
        null_share: share of the choices that fell on experts that compute nothing.
        untouched_share: share of the tokens that met no expert of the bank.
        mutual_information: what the expert tells of the modality, in nats: 0 where all modalities use experts alike,
            the entropy of the modalities where they share none.
    """

    layer: int
    part: str
    load: tuple[float, ...]
    balance: float
    busiest: float
    router_entropy: float | None
    experts_per_token: float
    dropped_share: float
    null_share: float
    untouched_share: float
    mutual_information: float


class RoutingTrace:
    """What :func:`record_routing` gathers.

    Args:
        model: whose layers are recorded.
    """

    def __init__(self, model: OmniMoeModel) -> None:
        config = model.config
        self.modalities: tuple[str, ...] = config.modality_names
        self.keys: tuple[str, ...] = tuple(config.keys or config.modality_names)
        sizes = len(self.modalities), len(self.keys)
        self._parts = [_Counts(layer, part, *sizes) for layer, part in model.backbone.parts]
        self._tokens: dict[str, Tensor] = {}
        self.num_forwards = 0

    @torch.no_grad()
    def add(self, routings: Sequence[Routing | None], rows: RowLayout) -> None:
        """Takes in the routings of one forward pass."""
        self.num_forwards += 1
        for name, ids, size in (
            ("modality", rows.modality_ids, len(self.modalities)),
            ("key", rows.key_ids, len(self.keys)),
        ):
            counted = torch.ones_like(ids) if rows.counted is None else rows.counted.long()
            new = ids.new_zeros(size).index_add(0, ids, counted)
            self._tokens[name] = self._tokens[name] + new if name in self._tokens else new
        for counts, routing in zip(self._parts, routings, strict=True):
            counts.add(routing, rows)

    def tokens(self, by: str = "modality") -> Tensor:
        """Tokens of each modality or key, ``(M,)`` int64."""
        names = self.keys if by == "key" else self.modalities
        return self._tokens[by].cpu() if by in self._tokens else torch.zeros(len(names), dtype=torch.int64)

    def load(self, by: str = "modality") -> Tensor:
        """Share of each modality's, or each key's, tokens that meets each expert.

        Args:
            by: ``"modality"`` or ``"key"``.

        Returns:
            ``(P, M, E)`` float64, over the experts of each layer and then of each attention that routes; E is the
            largest number of experts of any, free ones behind those of the bank. Over experts it sums to the choices of
            a token that were not dropped. Zeros for what had no tokens.
        """
        counts = [part.choices(by) for part in self._parts]
        widest = max((table.shape[1] for table in counts), default=1)
        padded = [nn.functional.pad(table, (0, widest - table.shape[1])) for table in counts]
        return torch.stack(padded) / self.tokens(by).double().clamp_min(1).view(1, -1, 1)

    def layers(self) -> list[LayerRouting]:
        """One record a router: of the experts of each layer that routes, then of each attention that does."""
        return [part.record() for part in self._parts if part.is_routed]

    def mean(self, name: str) -> float:
        """Mean of a number of :class:`LayerRouting` over routers; NaN where nothing is routed."""
        found = [getattr(layer, name) for layer in self.layers()]
        numbers = [value for value in found if value is not None]
        return sum(numbers) / len(numbers) if numbers else math.nan

    def heatmap(self, by: str = "modality", path: Path | str | None = None, *, title: str = "") -> Path | Figure:
        """Draws which experts are used.

        Args:
            by: rows of the picture. ``"modality"`` and ``"key"``: each layer's, and the share of its tokens that meets
                each expert. ``"layer"``: all tokens of a layer together.
            path: where a PNG goes; None for a figure of matplotlib.
            title: above it.

        Returns:
            The path, or the figure.

        Raises:
            ValueError: if nothing was recorded, or ``by`` is unknown.
            ImportError: without matplotlib.
        """
        if by not in VIEWS:
            raise ValueError(f"unknown view {by!r}; known: {', '.join(VIEWS)}")
        if not self.num_forwards:
            raise ValueError("nothing was recorded; call the model inside of `with record_routing(model) as trace`")
        names = list(self.keys if by == "key" else self.modalities)
        if by == "layer":
            share = self.tokens().double() / self.tokens().sum().clamp_min(1)
            load, names = (self.load() * share.view(1, -1, 1)).sum(1, keepdim=True), ["all tokens"]
        else:
            load = self.load(by)
        labels = [part.label for part in self._parts]
        free = [part.free for part in self._parts]
        return draw_load(load.numpy(), names, path, labels=labels, title=title, free=free)

    def __str__(self) -> str:
        head = "      router  balance  busiest  entropy  experts/token  dropped    null  untouched  I(modality; expert)"
        lines = [head]
        for layer in self.layers():
            certainty = "      -" if layer.router_entropy is None else f"{layer.router_entropy:7.3f}"
            lines.append(
                f"{_label(layer.part, layer.layer):>12}  {layer.balance:7.3f}  {layer.busiest:7.2f}  {certainty}  "
                f"{layer.experts_per_token:13.3f}  {layer.dropped_share:7.2%}  {layer.null_share:6.2%}  "
                f"{layer.untouched_share:9.2%}  {layer.mutual_information:19.3f}"
            )
        return "\n".join(lines) if len(lines) > 1 else "no layer routes: towers alone decide"


class _Counts:
    """Sums of one part of a layer, on the device of the rows."""

    def __init__(self, layer: int, part: Experts | BaseAttention, num_modalities: int, num_keys: int) -> None:
        self.layer, self.name = layer, "attention" if isinstance(part, BaseAttention) else "experts"
        self.label = _label(self.name, layer)
        self.towers = part.towers if isinstance(part, FeedForward) else None
        config = getattr(part, "declared", None) or getattr(part, "config", None)
        self.free: tuple[str, ...] = tuple(getattr(config, "free_experts", ()))
        if isinstance(part, FeedForward):
            self.num_bank = max(part.towers) + 1
        else:
            self.num_bank = int(getattr(part, "num_experts", 1))
        self.sizes = {"modality": num_modalities, "key": num_keys}
        self.is_routed = False
        self._sums: dict[str, Tensor] = {}

    def add(self, routing: Routing | None, rows: RowLayout) -> None:
        keys = rows.key_ids
        counted = torch.ones_like(keys, dtype=torch.bool) if rows.counted is None else rows.counted
        self._sum("tokens", counted.sum())
        if routing is None:
            if self.towers is None:
                return
            token_index, ids = torch.arange(len(keys), device=keys.device), keys.new_tensor(self.towers)[keys]
        else:
            self.is_routed = True
            token_index, ids = routing.token_index, routing.expert_ids
        taken = (ids >= 0) & counted[token_index]
        width = self.num_bank + len(self.free)
        for name, of in (("modality", rows.modality_ids), ("key", keys)):
            cells = of[token_index] * width + ids.clamp(0, width - 1)
            self._sum(name, keys.new_zeros(self.sizes[name] * width).index_add(0, cells, taken.long()))
        touched = keys.new_zeros(len(keys)).index_add(0, token_index, (taken & (ids < self.num_bank)).long()) > 0
        self._sum("untouched", (~touched & counted).sum())
        if routing is not None and routing.dropped is not None:
            self._sum("dropped", routing.dropped)
        if routing is not None and routing.router_logits is not None:
            probs = routing.router_logits.float().softmax(-1)
            entropy = -torch.xlogy(probs, probs).sum(-1)
            self._sum("entropy", torch.where(counted & entropy.isfinite(), entropy, 0).double().sum())
            self._sum("scored", (counted & entropy.isfinite()).sum())

    def _sum(self, name: str, value: Tensor) -> None:
        self._sums[name] = self._sums[name] + value if name in self._sums else value

    def _number(self, name: str) -> float:
        return float(self._sums[name]) if name in self._sums else 0.0

    def choices(self, by: str) -> Tensor:
        """``(M, E)`` float64, choices of each modality or key."""
        shape = self.sizes[by], self.num_bank + len(self.free)
        found = self._sums.get(by)
        return torch.zeros(shape, dtype=torch.float64) if found is None else found.cpu().double().view(shape)

    def record(self) -> LayerRouting:
        table = self.choices("modality")
        amount, total, tokens = table.sum(0), float(table.sum()), max(1.0, self._number("tokens"))
        load = amount / max(1.0, total)
        bank = amount[: self.num_bank]
        dropped = self._number("dropped")
        joint = table / max(1.0, total)
        scored = self._number("scored")
        return LayerRouting(
            layer=self.layer,
            part=self.name,
            load=tuple(load.tolist()),
            balance=_entropy(load) / math.log(len(load)) if len(load) > 1 else 1.0,
            busiest=float(bank.max() / bank.mean()) if bank.sum() else 0.0,
            router_entropy=self._number("entropy") / scored if scored else None,
            experts_per_token=float(bank.sum()) / tokens,
            dropped_share=dropped / max(1.0, total + dropped),
            null_share=float(amount[self.num_bank :].sum()) / max(1.0, total + dropped),
            untouched_share=self._number("untouched") / tokens,
            mutual_information=max(0.0, _entropy(joint.sum(0)) + _entropy(joint.sum(1)) - _entropy(joint)),
        )


def _label(part: str, layer: int) -> str:
    return f"layer {layer}" if part == "experts" else f"{part} {layer}"


def _entropy(shares: Tensor) -> float:
    return float(-torch.xlogy(shares, shares).sum())


@contextmanager
def record_routing(model: nn.Module) -> Iterator[RoutingTrace]:
    """Records every forward pass of a model inside of the ``with`` block, those of ``generate`` too.

    Args:
        model: an omnimoe model, or a wrapper around one: of PEFT, of data parallelism.

    Yields:
        The :class:`RoutingTrace`, which stays readable after the block.

    Raises:
        TypeError: if there is no omnimoe model in ``model``.
    """
    inner = next((module for module in model.modules() if isinstance(module, OmniMoeModel)), None)
    if inner is None:
        raise TypeError(f"{type(model).__qualname__} holds no omnimoe model; pass one, or a wrapper around one")
    trace = RoutingTrace(inner)

    def hook(module: nn.Module, args: Any, out: Any) -> None:
        if not hasattr(out, "routings"):
            raise TypeError("record_routing reads routings by name; call the model with return_dict=True")
        trace.add(out.routings, out.rows)

    handle = inner.register_forward_hook(hook)
    try:
        yield trace
    finally:
        handle.remove()

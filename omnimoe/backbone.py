"""Tier 5: the stack of blocks. ``x, routings, weights = block(x, rows, mask, cache)``, once a layer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from omnimoe.config import Config, ConfigError, Configurable
from omnimoe.config import Config as ConfigBase
from omnimoe.experts import Experts, FeedForward
from omnimoe.layers import Asked, Attention, AttentionMask, BaseAttention, Norm, Rope, RowLayout
from omnimoe.layers.uneven import build_norm
from omnimoe.routers import DepthRouter, Routing
from omnimoe.routers.depth import lengthened, shortened, thinned

PLACEMENTS = ("pre", "post")

Routings = tuple[Routing | None, ...]
"""Of a layer: that of its experts, None where nothing is routed, and that of its attention where it routes."""


class LayerScale(nn.Module):
    """A learned factor for every column of what a branch adds.

    Args:
        hidden_size: D.
        start: of all factors.

    Source: https://arxiv.org/abs/2103.17239.
    """

    def __init__(self, hidden_size: int, start: float) -> None:
        super().__init__()
        self.initial = {"weight": start}
        self.weight = nn.Parameter(torch.full((hidden_size,), start))

    def forward(self, x: Tensor) -> Tensor:
        """``(N, D)`` to the same."""
        return x * self.weight.to(x.dtype)


class Block(nn.Module, Configurable):
    """Attention and experts, each with a norm and a residual.

    ``"pre"`` normalises what enters a branch: ``x + f(norm(x))``. ``"post"`` normalises what leaves it,
    ``x + norm(f(x))``, as the 34B Chameleon ("swin norm") and Mixture-of-Transformers do.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config(ConfigBase):
        """A layer."""

        attention: BaseAttention.Config = field(default_factory=Attention.Config)
        """What mixes positions."""
        experts: Experts.Config = field(default_factory=FeedForward.Config)
        """What works on rows one by one."""
        norm: Norm.Config = field(default_factory=Norm.Config)
        """Both norms of the layer."""
        mlp_norm: Norm.Config | None = None
        """That of the experts, where it is another."""
        norm_placement: str = "pre"
        """``"pre"`` or ``"post"``."""
        layer_scale: float = 0.0
        """Start of a learned factor for every column of what each branch adds; 0 for none."""
        depth: DepthRouter.Config | None = None
        """Which rows the layer works on; None for all."""

        def __post_init__(self) -> None:
            super().__post_init__()
            if self.norm_placement not in PLACEMENTS:
                raise ConfigError(f"unknown norm_placement {self.norm_placement!r}; known: {', '.join(PLACEMENTS)}")

        @property
        def needs_key_order(self) -> bool:
            """Whether anything in the layer has copies by key."""
            norms = (self.norm, self.mlp_norm or self.norm)
            parts = self.attention.needs_key_order or self.experts.needs_key_order
            return parts or any(norm.towers != "shared" for norm in norms)

        @property
        def is_causal(self) -> bool:
            """Whether a row's routing depends on that row alone; masks have a say of their own."""
            chosen = self.depth is None or self.depth.is_causal
            return chosen and self.attention.is_causal and self.experts.is_causal

        @property
        def has_causal_form(self) -> bool:
            """Whether that can be asked for, as generation does."""
            # a cache that marks the rows a layer left out is read by attention over keys and values alone
            chosen = self.depth is None or (self.depth.has_causal_form and issubclass(self.attention.target, Attention))
            return chosen and self.attention.has_causal_form and self.experts.has_causal_form

    def __init__(
        self,
        config: Block.Config,
        *,
        hidden_size: int,
        num_modalities: int,
        layer_idx: int,
        widths: tuple[int, ...] = (),
    ) -> None:
        super().__init__()
        self.norm_placement = config.norm_placement
        shared: dict[str, Any] = {"hidden_size": hidden_size, "num_modalities": num_modalities}
        if widths:  # parts whose towers cannot differ in width do not know the word
            shared["widths"] = widths
        self.self_attn = config.attention.build(**shared, layer_idx=layer_idx)
        self.mlp = config.experts.build(**shared, layer_idx=layer_idx)
        self.attention_norm = build_norm(config.norm, **shared)
        self.mlp_norm = None if config.experts.is_absent else build_norm(config.mlp_norm or config.norm, **shared)
        self.attention_scale = self.mlp_scale = None
        if config.layer_scale:
            self.attention_scale = LayerScale(hidden_size, config.layer_scale)
            self.mlp_scale = None if config.experts.is_absent else LayerScale(hidden_size, config.layer_scale)
        self.depth = None if config.depth is None else config.depth.build(hidden_size=hidden_size)

    @property
    def takes_asked(self) -> bool:
        """Whether it can leave out rows that nobody reads: no router sees them, and attention is as it is here."""
        kind = type(self.self_attn)
        is_plain = kind.forward is Attention.forward and kind._attend is Attention._attend
        return is_plain and self.depth is None and isinstance(self.mlp, FeedForward)

    def forward(
        self, x: Tensor, rows: RowLayout, mask: AttentionMask, cache: Any = None
    ) -> tuple[Tensor, Routings, Tensor | None]:
        """One layer.

        Args:
            x: ``(N, D)`` rows.
            rows: their layout.
            mask: who may attend to whom.
            cache: keys and values of what came before, or None.

        Returns:
            ``(N, D)`` rows, or those that ``rows.asked`` names (see :attr:`takes_asked`), the routings of the layer,
            and the attention weights where they were kept.
        """
        if self.depth is None:
            return self._work(x, rows, mask, cache)
        losses = {}
        if cache is not None or rows.routes_causally:
            index, weights = self.depth.alone(x, rows)
            placed = thinned(rows, mask, index, cache)
        else:
            with rows.choosing():
                index, weights = self.depth(x, rows)
            losses = self.depth.losses(x, index)
            placed = *shortened(rows, mask, index), None
        kept = x[index]
        worked, routings, weights_of_keys = self._work(kept, *placed)
        x = x.index_add(0, index, (worked - kept) * weights.unsqueeze(1))
        towers = torch.tensor(getattr(self.mlp, "towers", (0,) * len(rows.offsets)), device=x.device)
        whole = lengthened(routings[0], index, weights, towers, rows, losses)
        return x, (whole, *(lengthened(part, index, weights, towers, rows) for part in routings[1:])), weights_of_keys

    def _work(
        self, x: Tensor, rows: RowLayout, mask: AttentionMask, cache: Any
    ) -> tuple[Tensor, Routings, Tensor | None]:
        is_pre = self.norm_placement == "pre"
        mixed = self.self_attn(self.attention_norm(x, rows) if is_pre else x, rows, mask, cache)
        if rows.asked is not None:
            x, rows = x[rows.asked.index], rows.asked.rows
        mixed, weights, *routed = mixed if isinstance(mixed, tuple) else (mixed, None)
        mixed = mixed if is_pre else self.attention_norm(mixed, rows)
        x = x + (mixed if self.attention_scale is None else self.attention_scale(mixed))
        if self.mlp_norm is None:
            return x, (None, *routed), weights
        worked, routing = self.mlp(self.mlp_norm(x, rows) if is_pre else x, rows)
        worked = worked if is_pre else self.mlp_norm(worked, rows)
        return x + (worked if self.mlp_scale is None else self.mlp_scale(worked)), (routing, *routed), weights


@dataclass(frozen=True, kw_only=True)
class LayerRange(Config):
    """Changes to the layers ``start, start + step, ...`` below ``stop``; a field left None keeps the model's."""

    start: int = 0
    """First layer."""
    stop: int | None = None
    """One past the last layer; None for all that follow."""
    step: int = 1
    """Every how many layers."""
    attention: BaseAttention.Config | None = None
    """Attention of these layers."""
    experts: Experts.Config | None = None
    """Experts of these layers."""
    norm: Norm.Config | None = None
    """Norms of these layers."""
    mlp_norm: Norm.Config | None = None
    """The norm before the experts of these layers, where it is another."""
    norm_placement: str | None = None
    """Placement in these layers."""
    depth: DepthRouter.Config | None = None
    """Which rows these layers work on."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.start < 0 or self.step < 1 or (self.stop is not None and self.stop <= self.start):
            raise ConfigError(
                f"a range of layers from start {self.start} to stop {self.stop} by step {self.step} holds no layer; "
                "start counts from 0, stop lies after it, step is 1 or more"
            )

    def change(self, block: Block.Config) -> Block.Config:
        """The block of a layer in the range."""
        names = ("attention", "experts", "norm", "mlp_norm", "norm_placement", "depth")
        return block.replace(**{name: getattr(self, name) for name in names if getattr(self, name) is not None})


LayerRange.target = LayerRange


class Backbone(nn.Module):
    """The layers.

    Args:
        blocks: the config of each layer.
        hidden_size: D.
        num_modalities: keys a row may have.
        widths: of the rows of each key; empty where all are D wide.
        layer: what a layer is built of.
    """

    def __init__(
        self,
        blocks: list[Block.Config],
        *,
        hidden_size: int,
        num_modalities: int,
        widths: tuple[int, ...] = (),
        layer: type[Block] = Block,
    ) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            layer(block, hidden_size=hidden_size, num_modalities=num_modalities, layer_idx=layer_idx, widths=widths)
            for layer_idx, block in enumerate(blocks)
        )

    def forward(
        self,
        x: Tensor,
        rows: RowLayout,
        mask: AttentionMask,
        positions: Tensor,
        cache: Any = None,
        *,
        observe: Callable[[Tensor], Tensor] | None = None,
        asked: Asked | None = None,
    ) -> tuple[Tensor, list[Routing | None], list[Tensor | None]]:
        """All layers in turn.

        Args:
            x: ``(N, D)`` rows.
            rows: their layout.
            mask: who may attend to whom.
            positions: ``(N, A)``, the rotary position of each row.
            cache: keys and values of what came before, or None.
            observe: is shown the rows before each layer, and gives those that the layer gets.
            asked: the rows that are read after the last layer, where not all are and it takes that.

        Returns:
            ``(N, D)`` rows, or those asked for, the routings of :attr:`parts`, and each layer's attention weights.
        """
        routings, of_attention, attentions, tables = [], [], [], {}
        for number, layer in enumerate(self.layers, start=1):
            if observe is not None:
                x = observe(x)
            placed = rows
            which = layer.self_attn.rotary()
            if which is not None:
                if which not in tables:
                    tables[which] = rows.with_rotary(*Rope(which[0], head_dim=which[1]).table(positions))
                placed = tables[which]
            if asked is not None and number == len(self.layers):
                placed = asked.among(placed)
            x, (routing, *routed), weights = layer(x, placed, mask, cache)
            routings.append(routing)
            of_attention += routed
            attentions.append(weights)
        return x, routings + of_attention, attentions

    @property
    def parts(self) -> list[tuple[int, Any]]:
        """What routings are of, each with its layer: the experts of every layer, then attention where it routes."""
        layers = [(int(number), layer) for number, layer in self.layers.named_children()]
        attentions = [(number, layer.self_attn) for number, layer in layers if layer.self_attn.routes]
        return [(number, layer.mlp) for number, layer in layers] + attentions

"""Mixture of depths: a layer works on its best rows alone, and the others go round it. Experimental.

The rows that are kept make shorter sequences of their own, so attention and experts save in the same measure. With
expert choice or any other router inside, depth comes first: experts choose among the rows that were kept (MoMa's staged
order).

A row's place among the kept depends on later rows. Where a row may not look at others, an auxiliary router foretells
which are kept (MoMa); without one a model with such layers trains and scores but does not generate. A cache then holds
every position of the layer, and the keys of those that went round it are no numbers, which marks them: it can be cut,
reordered and repeated as any other.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from omnimoe.config import Config as ConfigBase
from omnimoe.config import ConfigError, Configurable, register
from omnimoe.layers import AttentionMask, RowLayout
from omnimoe.registry import Registry
from omnimoe.routers.auxiliary import AuxiliaryRouter
from omnimoe.routers.base import Routing
from omnimoe.routers.pool import LEAST_SHARE, best_of_ranks, share_of
from omnimoe.routers.scores import Scorer

GATES = ("sigmoid", "linear")
DEPTH_POOLS = ("batch", "sequence", "ranks")
DEPTH_CAUSAL_FORMS = ("auxiliary", "none")

DEPTH_ROUTERS: Registry = Registry("depth router")


def register_depth_router(name: str, *, exist_ok: bool = False):
    """Decorator that files a :class:`DepthRouter` class under ``name``."""
    return register(DEPTH_ROUTERS, name, exist_ok=exist_ok)


@register_depth_router("best_rows")
class DepthRouter(nn.Module, Configurable):
    """Chooses the rows of a layer and weighs what it adds to them.

    One of another kind derives from it: :meth:`forward` chooses, :meth:`alone` does where a row may not look at others,
    and ``Config.capacity`` is the share of the rows that FLOPs are counted by.

    Source: Mixture-of-Depths, https://arxiv.org/abs/2404.02258, with a linear gate, by sequence, at capacity 0.125;
    MoMa, https://arxiv.org/abs/2407.21770, with a sigmoid gate, by batch, at capacity 0.25.
    """

    registry: ClassVar[Registry] = DEPTH_ROUTERS

    @dataclass(frozen=True, kw_only=True)
    class Config(ConfigBase):
        """Mixture of depths. Experimental: routed causally, MoMa found it worse than no depth at all."""

        capacity: float = 0.25
        """Share of the rows that the layer works on, rounded up."""
        pool: str = "sequence"
        """Rows compete inside their ``"sequence"``, in the whole ``"batch"``, or in the batches of all ``"ranks"``,
        which must hold as many positions each."""
        gate: str = "sigmoid"
        """What multiplies the layer's addition: the ``"sigmoid"`` of the score, or the score, ``"linear"``."""
        causal_form: str = "none"
        """How a row is chosen where it may not look at others: by an ``"auxiliary"`` router, or not at all, ``"none"``:
        then the model does not generate."""
        auxiliary_coef: float = 1.0
        """Coefficient of the auxiliary router's loss, the binary cross-entropy of the choice. It moves the auxiliary
        router alone."""

        def __post_init__(self) -> None:
            super().__post_init__()
            if not LEAST_SHARE <= self.capacity <= 1:
                raise ConfigError(
                    f"capacity must lie above 0, at {LEAST_SHARE} or more, and be at most 1, got {self.capacity}"
                )
            for name, known in (("pool", DEPTH_POOLS), ("gate", GATES), ("causal_form", DEPTH_CAUSAL_FORMS)):
                if getattr(self, name) not in known:
                    raise ConfigError(f"unknown {name} {getattr(self, name)!r}; known: {', '.join(known)}")
            self.check_not_negative("auxiliary_coef")

        @property
        def is_causal(self) -> bool:
            """Whether a row's choice depends on that row alone: never, but where that is asked for."""
            return False

        @property
        def has_causal_form(self) -> bool:
            """Whether it can choose a row by that row alone."""
            return self.causal_form != "none"

        def router_params(self, hidden_size: int) -> int:
            """Weights, for counting."""
            own = AuxiliaryRouter.num_params(hidden_size, 1) if self.causal_form == "auxiliary" else 0
            return hidden_size + own

    def __init__(self, config: DepthRouter.Config, *, hidden_size: int) -> None:
        super().__init__()
        self.config = config
        self.scorer = Scorer(hidden_size, 1)
        self.auxiliary = AuxiliaryRouter(hidden_size, 1) if config.causal_form == "auxiliary" else None

    def forward(self, x: Tensor, rows: RowLayout) -> tuple[Tensor, Tensor]:
        """Chooses.

        Args:
            x: ``(N, D)``.
            rows: their layout.

        Returns:
            ``(n,)`` int64, the rows that are kept, in row order, and ``(n,)`` their weights in the dtype of x.
        """
        score = self.scorer(x).squeeze(1)
        taken = torch.zeros_like(score, dtype=torch.bool)
        share = share_of(self.config.capacity, 1)
        if self.config.pool == "batch":
            taken[score.topk(-(-len(score) * share.numerator // share.denominator)).indices] = True
        elif self.config.pool == "ranks":
            room = rows.batch_size * rows.sequence_length
            taken = best_of_ranks(score.unsqueeze(1), None, share, room)[0].squeeze(1)
        else:
            sequence = rows.sequence_ids()
            # best first inside each sequence: stable sorts, the last by sequence
            order = score.argsort(descending=True, stable=True)
            order = order[sequence[order].argsort(stable=True)]
            sizes = torch.bincount(sequence, minlength=rows.batch_size)
            place = torch.arange(len(score), device=x.device) - (sizes.cumsum(0) - sizes)[sequence[order]]
            room = (sizes * share.numerator + share.denominator - 1) // share.denominator
            taken[order] = place < room[sequence[order]]
        return self._kept(taken, score, x.dtype)

    def alone(self, x: Tensor, rows: RowLayout) -> tuple[Tensor, Tensor]:
        """Chooses as :meth:`forward` does, each row by itself.

        Raises:
            ValueError: if there is no auxiliary router.
        """
        if self.auxiliary is None:
            raise ValueError(
                "a layer of a mixture of depths keeps rows by looking at later ones, which a cache does not allow; "
                "pass use_cache=False, or give it an auxiliary router with omnimoe.add_auxiliary_routers and train that"
            )
        return self._kept(self.auxiliary.takes(x).squeeze(1), self.scorer(x).squeeze(1), x.dtype)

    def _kept(self, taken: Tensor, score: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        index = taken.nonzero().squeeze(1)
        weights = score[index].sigmoid() if self.config.gate == "sigmoid" else score[index]
        return index, weights.to(dtype)

    def losses(self, x: Tensor, index: Tensor) -> dict[str, Tensor]:
        """The auxiliary router's loss by name, times its coefficient; nothing without one.

        Args:
            x: ``(N, D)``.
            index: ``(n,)`` int64, the rows that are kept.
        """
        if self.auxiliary is None:
            return {}
        chosen = x.new_zeros(len(x), 1, dtype=torch.float32).index_fill(0, index, 1)
        return {"auxiliary_depth": self.config.auxiliary_coef * self.auxiliary.loss(x, chosen)}


def shortened(rows: RowLayout, mask: AttentionMask, index: Tensor) -> tuple[RowLayout, AttentionMask]:
    """The layout and the mask of some rows, as sequences of their own in which time goes on.

    Args:
        rows: the layout of all rows.
        mask: of all rows, without a cache.
        index: ``(n,)`` int64, increasing.

    Returns:
        The same for the n rows.
    """
    device, batch_size = index.device, rows.batch_size
    place = index if rows.time_index is None else rows.time_index[index]
    sequence = place // rows.sequence_length
    counts = torch.bincount(sequence, minlength=batch_size)
    length = max(1, int(counts.max()))
    order = place.argsort()
    rank = torch.empty_like(place)
    rank[order] = torch.arange(len(place), device=device) - (counts.cumsum(0) - counts)[sequence[order]]
    time_index = sequence * length + rank
    short, valid = _chosen(rows, index, time_index, length)
    old = torch.zeros(batch_size * length, dtype=torch.int64, device=device)
    old[time_index] = place

    def moved(facts: Tensor) -> Tensor:
        return facts.reshape(-1)[old].view(batch_size, length)

    return short, dataclasses.replace(
        mask,
        query_length=length,
        key_length=length,
        valid=None if len(place) == batch_size * length else valid,
        segment_ids=None if mask.segment_ids is None else moved(mask.segment_ids),
        key_ids=moved(mask.key_ids),
        block_ids=None if mask.block_ids is None else moved(mask.block_ids),
        _cached={},
    )


def thinned(
    rows: RowLayout, mask: AttentionMask, index: Tensor, cache: Any
) -> tuple[RowLayout, AttentionMask, MarkedCache | None]:
    """The layout and the mask of some rows, which keep their places in time; the others are as padding.

    Args:
        rows: the layout of all rows.
        mask: of all rows, and of what is in the cache.
        index: ``(n,)`` int64, increasing.
        cache: a transformers cache, or None.

    Returns:
        The same for the n rows, and what stands for the cache in the layer. The mask is whole once that was updated.
    """
    place = index if rows.time_index is None else rows.time_index[index]
    thin, kept = _chosen(rows, index, place, rows.sequence_length)
    if mask.valid is not None:
        valid = mask.valid.clone()
    else:
        valid = torch.ones(rows.batch_size, mask.key_length, dtype=torch.bool, device=index.device)
    if cache is None:
        valid &= kept
    hidden = dataclasses.replace(mask, valid=valid, _cached={})
    return thin, hidden, None if cache is None else MarkedCache(cache, kept, valid)


class MarkedCache:
    """A cache in one layer, whose keys tell the positions that the layer worked on: those of others are no numbers.

    Args:
        cache: a transformers cache.
        kept: ``(B, T)`` bool, which of the new positions the layer works on.
        valid: ``(B, K)`` bool, of all positions; those that went round the layer are set to False in it.
    """

    def __init__(self, cache: Any, kept: Tensor, valid: Tensor) -> None:
        self.cache, self.kept, self.valid = cache, kept, valid

    def update(self, key: Tensor, value: Tensor, layer_idx: int) -> tuple[Tensor, Tensor]:
        """Takes in ``(B, H, T, C)`` keys and values, and gives those of all positions, zeros where marked."""
        marked = key.masked_fill(~self.kept[:, None, :, None], float("nan"))
        key, value = self.cache.update(marked, value, layer_idx)
        left_out = key[:, 0, :, 0].isnan()
        self.valid &= ~left_out
        return key.masked_fill(left_out[:, None, :, None], 0), value


def _chosen(rows: RowLayout, index: Tensor, time_index: Tensor, length: int) -> tuple[RowLayout, Tensor]:
    """The layout of some rows at new places, and ``(B, length)`` bool, the places that they fill."""
    device, total = index.device, rows.batch_size * length
    row_index = torch.zeros(total, dtype=torch.int64, device=device)
    row_index[time_index] = torch.arange(len(time_index), device=device)
    valid = torch.zeros(total, dtype=torch.bool, device=device)
    valid[time_index] = True
    keys = rows.key_ids[index]
    ends = torch.arange(len(rows.offsets), device=device)
    chosen = dataclasses.replace(
        rows,
        sequence_length=length,
        key_ids=keys,
        modality_ids=rows.modality_ids[index],
        offsets=torch.searchsorted(keys, ends, right=True).to(torch.int32) if rows.is_sorted else rows.offsets,
        time_index=time_index,
        row_index=row_index,
        valid=valid,
        cos=None if rows.cos is None else rows.cos[index],
        sin=None if rows.sin is None else rows.sin[index],
        token_ids=None if rows.token_ids is None else rows.token_ids[index],
        document_ids=None if rows.document_ids is None else rows.document_ids[index],
        _per_towers={},
    )
    return chosen, valid.view(rows.batch_size, length)


def lengthened(
    routing: Routing | None,
    index: Tensor,
    weights: Tensor,
    towers: Tensor,
    rows: RowLayout,
    losses: dict[str, Tensor] | None = None,
) -> Routing:
    """A routing of the kept rows as one of all rows; where the layer routes nothing, the choice of depth itself.

    Mixtures are left out, which were of the kept rows.

    Args:
        routing: of the kept rows.
        index: ``(n,)`` int64, their places.
        weights: ``(n,)``, of the layer.
        towers: ``(K,)`` int64, the copy that each key meets where nothing is routed.
        rows: the layout of all rows.
        losses: of the choice of depth.
    """
    if routing is None:
        return Routing(index, towers[rows.key_ids[index]], weights, losses=losses or {}, key_ids=rows.key_ids)
    logits, shared = routing.router_logits, routing.shared_weights
    if logits is not None:
        logits = logits.new_full((len(rows), logits.shape[1]), float("-inf")).index_copy(0, index, logits)
    if shared is not None:
        shared = shared.new_zeros(len(rows), shared.shape[1]).index_copy(0, index, shared)
    return dataclasses.replace(
        routing,
        token_index=index[routing.token_index],
        router_logits=logits,
        losses={**routing.losses, **(losses or {})},
        shared_weights=shared,
        spans=(),
        slots=None,
        key_ids=rows.key_ids,
    )

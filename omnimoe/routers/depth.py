"""Mixture of depths: a layer works on its best rows alone, and the others go round it. Experimental.

The rows that are kept make shorter sequences of their own, so attention and experts save in the same measure. A row's
place among the kept depends on later rows, and a cache would hold other rows in every layer, so a model with such
layers trains and scores but does not generate. With expert choice or any other router inside, depth comes first:
experts choose among the rows that were kept (MoMa's staged order).
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from omnimoe.config import Config as ConfigBase
from omnimoe.config import ConfigError, Configurable
from omnimoe.layers import AttentionMask, RowLayout
from omnimoe.routers.base import Routing
from omnimoe.routers.capacity import POOLS
from omnimoe.routers.scores import Scorer

GATES = ("sigmoid", "linear")


class DepthRouter(nn.Module, Configurable):
    """Chooses the rows of a layer and weighs what it adds to them.

    Source: Mixture-of-Depths, https://arxiv.org/abs/2404.02258, with a linear gate, by sequence, at capacity 0.125;
    MoMa, https://arxiv.org/abs/2407.21770, with a sigmoid gate, by batch, at capacity 0.25.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config(ConfigBase):
        """Mixture of depths."""

        capacity: float = 0.25
        """Share of the rows that the layer works on, rounded up."""
        pool: str = "sequence"
        """Rows compete inside their ``"sequence"``, or in the whole ``"batch"``."""
        gate: str = "sigmoid"
        """What multiplies the layer's addition: the ``"sigmoid"`` of the score, or the score, ``"linear"``."""

        def __post_init__(self) -> None:
            super().__post_init__()
            if not 0 < self.capacity <= 1:
                raise ConfigError(f"capacity must lie above 0 and be at most 1, got {self.capacity}")
            for name, known in (("pool", POOLS), ("gate", GATES)):
                if getattr(self, name) not in known:
                    raise ConfigError(f"unknown {name} {getattr(self, name)!r}; known: {', '.join(known)}")

    def __init__(self, config: DepthRouter.Config, *, hidden_size: int) -> None:
        super().__init__()
        self.config = config
        self.scorer = Scorer(hidden_size, 1)

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
        if self.config.pool == "batch":
            taken[score.topk(math.ceil(self.config.capacity * len(score))).indices] = True
        else:
            sequence = rows.sequence_ids()
            # best first inside each sequence: stable sorts, the last by sequence
            order = score.argsort(descending=True, stable=True)
            order = order[sequence[order].argsort(stable=True)]
            sizes = torch.bincount(sequence, minlength=rows.batch_size)
            place = torch.arange(len(score), device=x.device) - (sizes.cumsum(0) - sizes)[sequence[order]]
            room = (self.config.capacity * sizes.double()).ceil().long()
            taken[order] = place < room[sequence[order]]
        index = taken.nonzero().squeeze(1)
        weights = score[index].sigmoid() if self.config.gate == "sigmoid" else score[index]
        return index, weights.to(x.dtype)


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
    row_index = torch.zeros(batch_size * length, dtype=torch.int64, device=device)
    row_index[time_index] = torch.arange(len(place), device=device)
    valid = torch.zeros(batch_size * length, dtype=torch.bool, device=device)
    valid[time_index] = True
    old = torch.zeros(batch_size * length, dtype=torch.int64, device=device)
    old[time_index] = place
    keys = rows.key_ids[index]
    ends = torch.arange(len(rows.offsets), device=device)
    short = dataclasses.replace(
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
        _per_towers={},
    )

    def moved(facts: Tensor) -> Tensor:
        return facts.reshape(-1)[old].view(batch_size, length)

    return short, dataclasses.replace(
        mask,
        query_length=length,
        key_length=length,
        valid=None if len(place) == batch_size * length else valid.view(batch_size, length),
        segment_ids=None if mask.segment_ids is None else moved(mask.segment_ids),
        key_ids=moved(mask.key_ids),
        block_ids=None if mask.block_ids is None else moved(mask.block_ids),
        _cached={},
    )


def lengthened(routing: Routing | None, index: Tensor, weights: Tensor, towers: Tensor, rows: RowLayout) -> Routing:
    """A routing of the kept rows as one of all rows; where the layer routes nothing, the choice of depth itself.

    Args:
        routing: of the kept rows.
        index: ``(n,)`` int64, their places.
        weights: ``(n,)``, of the layer.
        towers: ``(K,)`` int64, the copy that each key meets where nothing is routed.
        rows: the layout of all rows.
    """
    if routing is None:
        return Routing(index, towers[rows.key_ids[index]], weights, key_ids=rows.key_ids)
    logits, shared = routing.router_logits, routing.shared_weights
    if logits is not None:
        logits = logits.new_full((len(rows), logits.shape[1]), float("-inf")).index_copy(0, index, logits)
    if shared is not None:
        shared = shared.new_zeros(len(rows), shared.shape[1]).index_copy(0, index, shared)
    return dataclasses.replace(
        routing,
        token_index=index[routing.token_index],
        router_logits=logits,
        shared_weights=shared,
        spans=(),
        key_ids=rows.key_ids,
    )

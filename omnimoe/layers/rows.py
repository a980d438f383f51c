"""Rows: the tokens of a batch without padding, put in key order once per forward.

The residual stream stays in this order through all layers, so that the copy a bank applies to a tower's rows sees one
contiguous slice. Only attention sees time order, through :meth:`RowLayout.to_time` and :meth:`RowLayout.to_rows`.

While a graph is traced no shape may depend on a value, so padding stays, behind the rows of every key, and what does
not count is marked instead of dropped.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor
from torch.utils._pytree import register_dataclass

from omnimoe.ops import permute, route_plan

if TYPE_CHECKING:
    from omnimoe.layers.asked import Asked
    from omnimoe.layers.linear import ExpertLinear


class MeetsExperts(Protocol):
    """Takes rows through a bank of linear maps whose copies a router chose among."""

    def through(self, bank: ExpertLinear, x: Tensor) -> Tensor:
        """``(N, D)`` rows to ``(N, F)``."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class RowLayout:
    """Where each row comes from and which copy of a bank it meets. Made by :meth:`build`, once per forward.

    Args:
        batch_size: B.
        sequence_length: T.
        key_ids: ``(N,)`` int64, the key that picks a copy, in row order; the modality unless the caller says otherwise.
        modality_ids: ``(N,)`` int64.
        offsets: ``(K,)`` int32, the end of each key's rows, where :attr:`is_sorted`.
        is_sorted: rows are in key order; otherwise in time order.
        time_index: ``(N,)`` int64 into the B·T positions, or None where row i is position i.
        row_index: ``(B·T,)`` int64, the row of each position, 0 at padding; None with ``time_index``.
        valid: ``(B·T,)`` bool, False at padding; None without padding.
        cos: ``(N, C/2)`` float32, rotary cosines of each row; set by the backbone.
        sin: ``(N, C/2)`` float32.
        routes_causally: a router may look at nothing but the row itself; set while a cache is in use.
        token_ids: ``(N,)`` int64, what stands at each row's position, for routers that look it up; None elsewhere.
        document_ids: ``(N,)`` int64, the document of a packed sequence that each row is of, for routers that mix rows;
            None elsewhere.
        counted: ``(N,)`` bool, False at rows that nothing may depend on: padding, or rows of another group; None where
            all count. Only in a traced graph.
        choices: remembers what routers choose, where layers are recomputed in backward; see :meth:`choosing`.
        compute: computes a bank of experts in another way than our ops: the last argument of ``BankMLP.forward``.
        sent: the experts that each row was sent to, inside of an attention that routes; see ``ExpertLinear``.
        asked: the rows that are read after this layer, where not all are; only in a last layer that takes it.
    """

    batch_size: int
    sequence_length: int
    key_ids: Tensor
    modality_ids: Tensor
    offsets: Tensor
    is_sorted: bool
    time_index: Tensor | None = None
    row_index: Tensor | None = None
    valid: Tensor | None = None
    cos: Tensor | None = None
    sin: Tensor | None = None
    routes_causally: bool = False
    counted: Tensor | None = None
    token_ids: Tensor | None = None
    document_ids: Tensor | None = None
    choices: AbstractContextManager | None = None
    compute: Callable | None = None
    sent: tuple[MeetsExperts, ...] = ()
    asked: Asked | None = None
    _per_towers: dict = dataclasses.field(default_factory=dict, repr=False, compare=False)

    @classmethod
    def build(
        cls,
        key_ids: Tensor,
        *,
        num_keys: int,
        modality_ids: Tensor | None = None,
        valid: Tensor | None = None,
        sort: bool = True,
        routes_causally: bool = False,
    ) -> RowLayout:
        """Drops padding and, if asked, sorts by key; equal keys keep their order in time.

        Without padding nothing is read back to the host. With it, the number of rows is, once; in a traced graph
        padding stays instead. On a CPU, where reading costs nothing, keys that are in order already are left alone: a
        batch of words, a decoded token.

        Args:
            key_ids: ``(B, T)`` int64 in ``[0, num_keys)``.
            num_keys: K.
            modality_ids: ``(B, T)`` int64; ``key_ids`` where None.
            valid: ``(B, T)`` bool, False at padding.
            sort: put rows in key order; False keeps time order, for models in which nothing has copies.
            routes_causally: see the class.
        """
        batch_size, sequence_length = key_ids.shape
        keys = key_ids.reshape(-1)
        modalities = keys if modality_ids is None else modality_ids.reshape(-1)
        counted = kept = None
        if valid is not None and torch.compiler.is_compiling():
            counted = valid.reshape(-1)
        elif valid is not None:
            kept = valid.reshape(-1).nonzero().squeeze(1)
            keys, modalities = keys[kept], modalities[kept]
        time_index = row_index = None
        is_sorted = sort or num_keys == 1
        if sort and num_keys > 1 and not _is_in_order(keys):
            plan = route_plan(keys if counted is None else torch.where(counted, keys, num_keys), num_keys)
            keys, modalities, offsets = keys[plan.order], modalities[plan.order], plan.offsets
            time_index, row_index = plan.order, plan.inverse
            counted = None if counted is None else counted[plan.order]
        else:
            ends = torch.arange(num_keys, device=keys.device)
            offsets = torch.searchsorted(keys.contiguous(), ends, right=True) if is_sorted else ends
        if kept is not None:
            time_index = kept if time_index is None else kept[time_index]
            row_index = torch.zeros(batch_size * sequence_length, dtype=torch.int64, device=keys.device)
            row_index[time_index] = torch.arange(len(time_index), device=keys.device)
        return cls(
            batch_size=batch_size,
            sequence_length=sequence_length,
            key_ids=keys,
            modality_ids=modalities,
            offsets=offsets.to(torch.int32),
            is_sorted=is_sorted,
            time_index=time_index,
            row_index=row_index,
            valid=None if valid is None else valid.reshape(-1),
            routes_causally=routes_causally,
            counted=counted,
        )

    def __len__(self) -> int:
        return len(self.key_ids)

    def to_time(self, x: Tensor) -> Tensor:
        """``(N, ...)`` in row order to ``(B, T, ...)`` in time order; padding comes out as zeros."""
        if self.counted is not None:
            x = torch.where(self.counted.view(-1, *(1,) * (x.ndim - 1)), x, 0)
        if self.time_index is not None and self.row_index is not None:
            x = permute(x, self.row_index, self.time_index, self._filled)
        return x.view(self.batch_size, self.sequence_length, *x.shape[1:])

    def to_rows(self, x: Tensor) -> Tensor:
        """``(B, T, ...)`` in time order to ``(N, ...)`` in row order, the inverse of :meth:`to_time`."""
        x = x.reshape(self.batch_size * self.sequence_length, *x.shape[2:])
        if self.time_index is None or self.row_index is None:
            return x
        return permute(x, self.time_index, self.row_index, self._filled)

    @property
    def _filled(self) -> Tensor | None:
        return self.valid if self.counted is None else None  # both sides are equally long: nothing is missing

    def segments(self, towers: tuple[int, ...]) -> tuple[Tensor, list[int]]:
        """Runs of rows that meet the same copy, for a tower map.

        Args:
            towers: ``(K,)``, the copy of each key.

        Returns:
            ``(S,)`` int32, the end of each run, and the copy of each run. Neighbouring keys with one copy make one run.
        """
        if towers not in self._per_towers:
            if not self.is_sorted:
                raise ValueError(f"rows are in time order, but a bank with the tower map {towers} needs key order")
            last = [key for key in range(len(towers)) if key + 1 == len(towers) or towers[key + 1] != towers[key]]
            ends = self.offsets if len(last) == len(towers) else self.offsets[last]
            self._per_towers[towers] = ends, [towers[key] for key in last]
        return self._per_towers[towers]

    def where(self, modality_id: int, count: int | None = None) -> Tensor:
        """The rows of one modality, in order of time.

        Args:
            modality_id: which.
            count: how many a traced graph takes for granted; otherwise as many as there are come back.

        Returns:
            ``(n,)`` int64.
        """
        held = self.modality_ids == modality_id
        if torch.compiler.is_compiling():
            held = held if self.counted is None else held & self.counted
            place = torch.arange(len(self), device=held.device) if self.time_index is None else self.time_index
            return torch.where(held, place, len(self)).argsort(stable=True)[:count]
        found = held.nonzero().squeeze(1)
        if self.time_index is None or not self.is_sorted:
            return found
        # a modality whose rows have several keys lies in several places
        return found[self.time_index[found].argsort()]

    def key_spans(self) -> list[tuple[int, int]]:
        """``(start, stop)`` of each key's rows, read back to the host once per forward."""
        if "spans" not in self._per_towers:
            if not self.is_sorted:
                raise ValueError("rows are in time order; a part that works by key must leave needs_key_order True")
            ends = self.offsets.tolist()
            self._per_towers["spans"] = list(zip([0, *ends[:-1]], ends, strict=True))
        return self._per_towers["spans"]

    def runs(self, towers: tuple[int, ...]) -> list[tuple[int, int, int]]:
        """``(start, stop, copy)`` of each run of rows that meet the same copy, as :meth:`segments`, on the host."""
        found: list[tuple[int, int, int]] = []
        for copy, (start, stop) in zip(towers, self.key_spans(), strict=True):
            if found and found[-1][2] == copy:
                found[-1] = (found[-1][0], stop, copy)
            else:
                found.append((start, stop, copy))
        return found

    def span(self, key: int) -> RowLayout:
        """The rows of one key as a layout of their own, for a router that works inside a group."""
        start, stop = self.key_spans()[key]
        time_index = self.time_index
        if time_index is None and start:
            time_index = torch.arange(len(self), device=self.key_ids.device)
        return dataclasses.replace(
            self,
            key_ids=self.key_ids[start:stop],
            modality_ids=self.modality_ids[start:stop],
            cos=None if self.cos is None else self.cos[start:stop],
            sin=None if self.sin is None else self.sin[start:stop],
            time_index=None if time_index is None else time_index[start:stop],
            token_ids=None if self.token_ids is None else self.token_ids[start:stop],
            document_ids=None if self.document_ids is None else self.document_ids[start:stop],
            row_index=None,
            is_sorted=False,
            _per_towers={},
        )

    def sequence_ids(self) -> Tensor:
        """``(N,)`` int64, the sequence of the batch that each row is of."""
        place = self.time_index
        if place is None:
            place = torch.arange(len(self), device=self.key_ids.device)
        return place // self.sequence_length

    def only(self, key: int) -> RowLayout:
        """The same rows, of which those of one key count: what :meth:`span` is outside of a traced graph."""
        held = self.key_ids == key
        counted = held if self.counted is None else held & self.counted
        return dataclasses.replace(self, counted=counted, _per_towers={})

    def choosing(self) -> AbstractContextManager:
        """``with rows.choosing():`` around what decides where a row goes, so that a layer that is recomputed decides as
        it did the first time."""
        return nullcontext() if self.choices is None else self.choices

    def with_rotary(self, cos: Tensor, sin: Tensor) -> RowLayout:
        """A copy that carries the rotary table of its rows."""
        return dataclasses.replace(self, cos=cos, sin=sin)


def _is_in_order(keys: Tensor) -> bool:
    """Whether keys do not decrease, as far as the host may know."""
    if keys.device.type != "cpu" or torch.compiler.is_compiling():
        return False
    return bool((keys[1:] >= keys[:-1]).all())


register_dataclass(
    RowLayout,
    field_names=[held.name for held in dataclasses.fields(RowLayout) if held.name != "_per_towers"],
    drop_field_names=["_per_towers"],  # made again where it is missed
    serialized_type_name="omnimoe.RowLayout",
)

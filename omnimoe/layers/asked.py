"""The rows of a last layer that anybody reads, where only the ends of sequences are looked at."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
from torch import Tensor

from omnimoe.layers.masks import AttentionMask
from omnimoe.layers.rows import RowLayout


@dataclass(frozen=True)
class Asked:
    """The last positions of every sequence. Of the others a last layer makes keys and values, and nothing else.

    Args:
        rows: their layout.
        mask: which keys, of all positions, they attend to.
        index: ``(n,)`` int64, the row that each is among all.
    """

    rows: RowLayout
    mask: AttentionMask
    index: Tensor

    @classmethod
    def last(cls, count: int, rows: RowLayout, mask: AttentionMask, key_ids: Tensor, modality_ids: Tensor) -> Asked:
        """The last ``count`` positions.

        Args:
            count: at least 1, at most T.
            rows: the layout of all rows, without a rotary table.
            mask: of all of them.
            key_ids: ``(B, T)`` int64.
            modality_ids: ``(B, T)`` int64.
        """
        shape = key_ids.shape
        few = RowLayout.build(
            key_ids[:, -count:],
            num_keys=len(rows.offsets),
            modality_ids=modality_ids[:, -count:],
            valid=None if rows.valid is None else rows.valid.view(shape)[:, -count:],
            sort=rows.is_sorted,
            routes_causally=rows.routes_causally,
        )
        numbers = rows.to_time(torch.arange(len(rows), device=key_ids.device))
        return cls(dataclasses.replace(few, compute=rows.compute), mask.last(count), few.to_rows(numbers[:, -count:]))

    def among(self, rows: RowLayout) -> RowLayout:
        """The layout of all rows, for the layer that is asked for these alone."""
        few = self.rows
        if rows.cos is not None and rows.sin is not None:
            few = few.with_rotary(rows.cos[self.index], rows.sin[self.index])
        return dataclasses.replace(rows, asked=dataclasses.replace(self, rows=few))


__all__ = ["Asked"]

"""Tier 9: columns of a batch and the features that stand in them: what is kept of them, and where they may be cut."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from omnimoe.blocks import block_ids_of, block_positions
from omnimoe.encoders import Features
from omnimoe.inputs import InputError
from omnimoe.model_config import OmniMoeConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class Layout:
    """Some columns of a batch in which rows of one continuous modality are drawn.

    Args:
        config: of the model.
        name: the modality that is drawn.
        columns: ``(B, T, ...)`` each: input_ids, modality_ids, position_ids, and key_ids where there are any.
        valid: ``(B, T)`` bool, False at padding.
        drawn: ``(B, T)`` bool.
        rows: ``(n,)`` int64, the rows of ``name`` that stand here, counted over the whole batch.
        shapes: rows and columns of each picture of ``name`` here; empty where it takes plain rows.
        features: of the other continuous modalities, those that stand here.
        before: ``(B, past)`` bool, what a cache holds in front; None where nothing is.
    """

    config: OmniMoeConfig
    name: str
    columns: dict[str, Tensor]
    valid: Tensor
    drawn: Tensor
    rows: Tensor
    shapes: tuple[tuple[int, int], ...] = ()
    features: dict[str, Any] = dataclasses.field(default_factory=dict)
    before: Tensor | None = None

    def held(self, name: str) -> Tensor:
        """``(B, T)`` bool, where rows of a modality stand."""
        modality_id = self.config.modality_names.index(name)
        return (self.columns["modality_ids"] == modality_id) & self.valid

    def arguments(self, rows: Tensor, times: Tensor) -> dict[str, Any]:
        """What the model is called with.

        Args:
            rows: ``(n, C)``, all rows of the drawn modality.
            times: ``(n,)``, the time of each.
        """
        features, timesteps = dict(self.features), None
        if len(self.rows):
            mine, each = rows[self.rows], times[self.rows]
            if self.shapes:
                counts = [tall * wide for tall, wide in self.shapes]
                parts = zip(mine.split(counts), self.shapes, strict=True)
                features[self.name] = [part.view(*shape, -1) for part, shape in parts]
                each = torch.stack([part[0] for part in each.split(counts)])
            else:
                features[self.name] = mine
            timesteps = {self.name: each}
        seen = self.valid if self.before is None else torch.cat((self.before, self.valid), dim=1)
        mask = None if bool(seen.all()) else seen.long()
        return {**self.columns, "attention_mask": mask, "features": features, "timesteps": timesteps}

    def between(self, start: int, stop: int | None) -> Layout:
        """Columns in a row; no picture may be cut in two."""
        inside = torch.zeros_like(self.valid)
        inside[:, start:stop] = True
        rows, shapes, features = self._filtered(inside)
        return dataclasses.replace(
            self,
            columns={key: value[:, start:stop] for key, value in self.columns.items()},
            valid=self.valid[:, start:stop],
            drawn=self.drawn[:, start:stop],
            rows=rows,
            shapes=shapes,
            features=features,
            before=self.valid[:, :start] if start else None,
        )

    def without(self, names: Sequence[str] | None) -> Layout:
        """What is left of a condition.

        Args:
            names: modalities that are left out, each with the boundary tokens of its spans; with None all, and only the
                begin of document is kept before what is drawn.
        """
        config, ids = self.config, self.columns["input_ids"]
        kept, markers = self._with_markers(self.drawn), torch.zeros_like(self.drawn)
        for held in config.modalities:
            if held.begin_id is not None or held.end_id is not None:
                mine = self._with_markers(self.held(held.name))
                markers |= mine & ~self.held(held.name)
                if names is not None and held.name not in names:
                    kept |= mine
        for name in () if names is None else set(config.modality_names) - set(names):
            kept |= self.held(name) & ~markers
        if names is None:
            kept |= ids == (-1 if config.bos_token_id is None else config.bos_token_id)
        return self._moved(kept & self.valid)

    def _with_markers(self, held: Tensor) -> Tensor:
        """Spans and the boundary tokens next to them."""
        ids, kept = self.columns["input_ids"], held.clone()
        for modality in self.config.modalities:
            mine = held & self.held(modality.name)
            # -1 is no token, so a boundary that the modality lacks is found nowhere
            kept[:, :-1] |= mine[:, 1:] & (ids[:, :-1] == (-1 if modality.begin_id is None else modality.begin_id))
            kept[:, 1:] |= mine[:, :-1] & (ids[:, 1:] == (-1 if modality.end_id is None else modality.end_id))
        return kept

    def _moved(self, kept: Tensor) -> Layout:
        """What is kept, at the right end of each row, in its order."""
        column = kept.long().argsort(dim=1, stable=True)[:, -int(kept.sum(1).max()) :]
        valid = kept.gather(1, column)
        rows, shapes, features = self._filtered(kept)
        columns = {key: value.gather(1, column) for key, value in self.columns.items() if key != "position_ids"}
        columns["position_ids"] = self._positions(column, valid, columns)
        return dataclasses.replace(
            self,
            columns=columns,
            valid=valid,
            drawn=self.drawn.gather(1, column) & valid,
            rows=rows,
            shapes=shapes,
            features=features,
        )

    def _positions(self, column: Tensor, valid: Tensor, columns: Mapping[str, Tensor]) -> Tensor:
        given = self.columns["position_ids"]
        if self.config.positions == "blocks":
            drawn = self.drawn.gather(1, column) & valid
            return block_positions(
                block_ids_of(self.config, columns["modality_ids"], columns["input_ids"], drawn), valid
            )
        time = (valid.long().cumsum(1) - 1).clamp_min(0)
        if given.ndim == 2:
            return time
        # a run of columns moves as one, so that rows and columns stay where they are relative to its start
        old = given.expand(len(column), -1, -1).gather(1, column.unsqueeze(-1).expand(-1, -1, given.shape[2]))
        starts = F.pad(column[:, 1:] != column[:, :-1] + 1, (1, 0), value=True)
        place = torch.arange(column.shape[1], device=column.device).expand_as(column)
        first = torch.where(starts, place, 0).cummax(dim=1).values
        moved = (old[..., 0] - time).gather(1, first)
        return (old - moved.unsqueeze(-1)).clamp_min(0)

    def _filtered(self, kept: Tensor) -> tuple[Tensor, tuple[tuple[int, int], ...], dict[str, Any]]:
        """Rows, shapes and features of what stands at ``kept (B, T)``."""
        held = self.held(self.name)
        shapes = self.shapes
        if shapes:
            shapes = tuple(shapes[i] for i in _spans_in(held, kept))
        features = {}
        for name, given in self.features.items():
            mine = self.held(name)
            if name not in self.config.own_form:
                part = given[kept[mine]]
                if len(part):
                    features[name] = part
            elif chosen := _spans_in(mine, kept, self._num_tokens(name)):
                features[name] = _chosen(given, chosen)
        return self.rows[kept[held]], shapes, features

    def _num_tokens(self, name: str) -> int | None:
        """Positions of every span of a modality, where that is fixed."""
        return self.config.modalities[self.config.modality_names.index(name)].num_tokens


def _spans_in(held: Tensor, kept: Tensor, length: int | None = None) -> list[int]:
    """Which spans of ``held (B, T)`` stand at ``kept``, in order of batch and time: runs, cut into pieces of ``length``
    where that is fixed."""
    starts = held & ~F.pad(held[:, :-1], (1, 0))
    if length is not None:
        place = torch.arange(held.shape[1], device=held.device).expand_as(held)
        starts = held & ((place - torch.where(starts, place, 0).cummax(dim=1).values) % length == 0)
    whole = kept[starts]
    if bool((kept[held] != whole[starts.flatten().cumsum(0).view_as(held)[held] - 1]).any()):
        raise InputError("a picture would be cut in two; leave use_cache out")
    return whole.nonzero().squeeze(1).tolist()


def _chosen(given: Any, chosen: list[int]) -> Any:
    """Some spans of features in a form of their own: a list of pictures, or tensors with spans along the first axis."""
    if isinstance(given, Mapping):
        return {key: value[chosen] for key, value in given.items()}
    if isinstance(given, Tensor | Features):
        return given[chosen]
    return [given[i] for i in chosen]


__all__ = ["Layout"]

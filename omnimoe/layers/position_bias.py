"""Scores that attention adds by where two tokens stand to each other: learned, a table for the spans of each modality.

They are worked out once in a forward, for all layers. Attention knows nothing of tables: it gets a mask that adds.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from omnimoe.config import Config as ConfigBase
from omnimoe.config import ConfigError, Configurable, register
from omnimoe.layers.masks import AttentionMask
from omnimoe.registry import Registry

POSITION_BIASES: Registry = Registry("position bias")

SPECIAL = 3
"""Rows of a table for the first token of a span: asking, asked, and both."""


def register_position_bias(name: str, *, exist_ok: bool = False):
    """Decorator that files a :class:`PositionBias` class under ``name``."""
    return register(POSITION_BIASES, name, exist_ok=exist_ok)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Biases:
    """What the layers of one forward add to their scores.

    Args:
        index: ``(B, T, T)`` int64, or ``(1, T, T)`` where all sequences are alike: the row for a query and a key.
        weight: ``(R, L H)``, the heads of all layers in turn, or ``(R, H)`` where the layers share them.
        num_heads: H.
    """

    index: Tensor
    weight: Tensor
    num_heads: int
    _cached: dict = dataclasses.field(default_factory=dict, repr=False, compare=False)

    def of(self, layer_idx: int) -> Tensor:
        """``(B or 1, H, T, T)``, what a layer adds."""
        layer = layer_idx if self.weight.shape[1] > self.num_heads else 0
        if layer not in self._cached:
            weight = self.weight[:, layer * self.num_heads : (layer + 1) * self.num_heads]
            found = F.embedding(self.index, weight).permute(0, 3, 1, 2)
            if self.weight.shape[1] > self.num_heads:
                return found
            self._cached[layer] = found
        return self._cached[layer]


@dataclasses.dataclass(frozen=True, kw_only=True)
class BiasedMask(AttentionMask):
    """A mask that attention adds to its scores, made by :meth:`add`.

    Args:
        added: ``(B or 1, H, Q, K)``, the lowest number of its dtype or near it where attention is not allowed.
    """

    added: Tensor

    @classmethod
    def add(cls, mask: AttentionMask, bias: Tensor) -> BiasedMask:
        """The mask with a bias ``(B or 1, H, Q, K)`` in the dtype of the queries."""
        kept = {held.name: getattr(mask, held.name) for held in dataclasses.fields(mask) if held.init}
        added = bias if mask.needs_no_mask else bias + mask.additive(bias.dtype)
        # a rule that no kernel knows: one that takes no mask refuses it by name
        return cls(**{**kept, "rule": "biased", "bias": None, "_cached": {}}, added=added)

    def dense(self) -> Tensor:
        """See the class."""
        return self.added

    def additive(self, dtype: torch.dtype) -> Tensor:
        """See the class."""
        return self.added.to(dtype)

    def flex(self):
        """Refused: a block mask adds nothing.

        Raises:
            ValueError: always.
        """
        raise ValueError("flex_attention adds no learned position biases here; take 'sdpa' or 'eager'")


class PositionBias(nn.Module, Configurable):
    """What a model adds to the scores of attention by where tokens stand.

    Contract: ``__init__(config, *, num_heads, num_layers, num_modalities)`` and
    ``forward(modality_ids (B, T), positions (B, T), valid (B, T) or None) -> Biases``.
    """

    registry: ClassVar[Registry] = POSITION_BIASES

    @dataclass(frozen=True, kw_only=True)
    class Config(ConfigBase):
        """Nothing to choose."""


class BiasTable(nn.Module):
    """Learned scores ``(rows, columns)``, which start at nothing."""

    initial = {"weight": 0.0}

    def __init__(self, rows: int, columns: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(rows, columns))


@register_position_bias("span_tables")
class SpanTables(PositionBias):
    """A table for each modality, over the distances inside of one of its spans.

    The first token of a span stands for the whole of it, and has rows of its own. Between spans nothing is added, or
    one score for each pair of modalities.

    Source: https://arxiv.org/abs/2111.02358; distances in buckets: https://arxiv.org/abs/2202.03052.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config(PositionBias.Config):
        """Tables, one entry of each tuple a modality."""

        reaches: tuple[int, ...] = ()
        """Rows for distances along a line, to either side and with 0; 0 where the modality is no line."""
        longest: tuple[int, ...] = ()
        """Length of a line whose distances past half of ``reaches`` share rows, the more the farther; 0 where every
        distance has its own. Empty for 0 everywhere."""
        sides: tuple[int, ...] = ()
        """Cells along a side of a square grid, whose distances count by row and column; 0 where it is no grid."""
        counts_to_key: bool = False
        """Count a distance along a line from the query to the key, and not from the key to the query."""
        by_layer: bool = True
        """Scores of its own for every layer; otherwise all layers add the same."""
        crosses: bool = False
        """A learned score for a query and a key in spans of two modalities."""

        def __post_init__(self) -> None:
            super().__post_init__()
            tuples = (self.reaches, self.longest or (0,) * len(self.reaches), self.sides)
            if len({len(held) for held in tuples}) != 1 or min((0, *self.reaches, *self.longest, *self.sides)) < 0:
                raise ConfigError(
                    f"reaches {self.reaches}, longest {self.longest} and sides {self.sides} must have one number from "
                    "0 for each modality"
                )
            for reach, length, side in zip(*tuples, strict=True):
                if (reach and side) or (length and not 4 <= reach < length):
                    raise ConfigError(
                        f"a modality has reach {reach}, side {side} and longest {length}; give it a reach or a side, "
                        "and longest only above a reach of 4 or more"
                    )

        def rows_of(self, modality: int) -> int:
            """Rows of the table of a modality; 0 for none."""
            reach, side = self.reaches[modality], self.sides[modality]
            if side:
                return (2 * side - 1) ** 2 + SPECIAL
            return 2 * reach - 1 + SPECIAL if reach else 0

        def num_weights(self, num_heads: int, num_layers: int) -> int:
            """Weights of all tables."""
            count = len(self.reaches)
            rows = sum(self.rows_of(modality) for modality in range(count)) + self.crosses * count * (count - 1)
            return rows * num_heads * (num_layers if self.by_layer else 1)

    def __init__(self, config: SpanTables.Config, *, num_heads: int, num_layers: int, num_modalities: int) -> None:
        super().__init__()
        if len(config.reaches) != num_modalities:
            raise ConfigError(f"reaches {config.reaches} must have one number for each of {num_modalities} modalities")
        self.config, self.num_heads = config, num_heads
        columns = num_heads * (num_layers if config.by_layer else 1)
        rows = {str(modality): config.rows_of(modality) for modality in range(num_modalities)}
        self.tables = nn.ModuleDict({name: BiasTable(count, columns) for name, count in rows.items() if count})
        self.cross = BiasTable(num_modalities * (num_modalities - 1), columns) if config.crosses else None
        self.num_columns = columns

    def forward(self, modality_ids: Tensor, positions: Tensor, valid: Tensor | None = None) -> Biases:
        """The biases of a batch.

        Args:
            modality_ids: ``(B, T)`` int64.
            positions: ``(B, T)`` int64, from 0 in each span.
            valid: ``(B, T)`` bool, False at padding.

        Returns:
            :class:`Biases` over all pairs of positions.

        Raises:
            ValueError: on the CPU, if a position or a distance is past its table.
        """
        begins = positions == 0 if valid is None else (positions == 0) & valid
        spans = begins.long().cumsum(1)
        query, key = modality_ids.unsqueeze(2), modality_ids.unsqueeze(1)
        inside = (query == key) & (spans.unsqueeze(2) == spans.unsqueeze(1))
        weights = [self.tables[name].weight for name in self.tables]
        weights += [] if self.cross is None else [self.cross.weight]
        weights.append(next(self.parameters()).new_zeros(1, self.num_columns))
        index = torch.full_like(inside, sum(map(len, weights)) - 1, dtype=torch.int64)
        if self.cross is not None:
            first = sum(map(len, weights[:-2]))
            pair = query * (len(self.config.reaches) - 1) + key - (key > query).long()
            index = torch.where(query != key, first + pair, index)
        start = 0
        for name, table in self.tables.items():
            held = inside & (query == int(name))
            if valid is not None:
                held = held & valid.unsqueeze(2) & valid.unsqueeze(1)
            index = torch.where(held, start + self._rows(int(name), positions, held), index)
            start += len(table.weight)
        if index.device.type == "cpu" and not torch.compiler.is_compiling() and bool((index == index[:1]).all()):
            index = index[:1]
        return Biases(index=index, weight=torch.cat(weights), num_heads=self.num_heads)

    def _rows(self, modality: int, positions: Tensor, held: Tensor) -> Tensor:
        """``(B, T, T)``, rows of the table of a modality."""
        query, key = positions.unsqueeze(2), positions.unsqueeze(1)
        side, reach = self.config.sides[modality], self.config.reaches[modality]
        plain = self.config.rows_of(modality) - SPECIAL
        if side:
            self._check(held & (query > side**2), query, f"the {side} x {side} cells of a span")
            apart = [(query - 1) // side - (key - 1) // side, (query - 1) % side - (key - 1) % side]
            row = (apart[0] + side - 1) * (2 * side - 1) + apart[1] + side - 1
        else:
            apart = [key - query if self.config.counts_to_key else query - key]
            longest = self.config.longest[modality] if self.config.longest else 0
            near = apart[0] if not longest else _bucket(apart[0], reach // 2, longest)
            inner = held & (query > 0) & (key > 0)
            self._check(inner & (near.abs() >= reach), apart[0].abs(), f"the distances below {longest or reach}")
            row = near + reach - 1
        row = torch.where(query == 0, plain, torch.where(key == 0, plain + 1, row))
        row = torch.where((query == 0) & (key == 0), plain + 2, row)
        return row.clamp(0, plain + SPECIAL - 1)

    def _check(self, wrong: Tensor, value: Tensor, known: str) -> None:
        if wrong.device.type == "cpu" and not torch.compiler.is_compiling() and bool(wrong.any()):
            found = int(value.expand_as(wrong)[wrong].max())
            raise ValueError(f"place or distance {found} is past {known} that biases are for; shorten the input")


def _bucket(apart: Tensor, middle: int, longest: int) -> Tensor:
    """Distances with those past ``middle`` in buckets that grow with the logarithm, up to a line of ``longest``."""
    far = apart.abs().clamp_min(middle)
    steps = torch.log(far / middle) / math.log((longest - 1) / middle) * (middle - 1)
    return torch.where(apart.abs() <= middle, apart, apart.sign() * (middle + steps.ceil().long()))


__all__ = [
    "POSITION_BIASES",
    "BiasedMask",
    "Biases",
    "PositionBias",
    "SpanTables",
    "register_position_bias",
]

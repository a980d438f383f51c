"""Tables between published tensors and ours, and the plan that a table makes for one model.

A rule says where one of our tensors comes from: which published tensors are the copies of its bank, and which of them
lie row on row in a copy. Expanded, a table is a list of pieces, each a published tensor (or some of its rows) and the
place of its numbers in ours. A plan is refused unless the pieces tile both sides exactly, so nothing is dropped,
nothing is left over, and the way back is the same list read from the other side.

transformers has such tables too (``WeightRenaming``, ``WeightConverter``). Ours are our own for four reasons: a bank is
made of copies that a suffix tells apart (``q_proj`` and ``q_proj_moe_gen``), which patterns over a list of modules do
not say; theirs run inside ``from_pretrained`` on whole tensors, while a piece can be written to its place in a file as
it is read, which bounds the memory; theirs are not held to use every element once; and a family without a class of
transformers has no place to register one.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from omnimoe.convert.changes import AS_IS, Change

Shape = tuple[int, ...]


class RuleError(ValueError):
    """A table that does not fit its model: a mistake of whoever wrote it, not of a checkpoint."""


@dataclass(frozen=True)
class Rows:
    """Some rows of a published tensor, where it holds several of ours: ``wqkv``."""

    name: str
    start: int
    stop: int


@dataclass(frozen=True)
class Part:
    """A published tensor that makes ``rows`` rows of a copy, where the parts of the copy are not equally long."""

    name: str
    rows: int


Source = str | Rows | Part


@dataclass(frozen=True)
class Rule:
    """Where one of our tensors comes from. Made by :func:`rename` and :func:`bank`.

    Args:
        ours: name of our parameter or buffer.
        copies: of each copy, the published tensors that lie row on row in it; one copy where there is no bank.
        is_bank: our tensor has a leading axis of copies.
        change: what happens to each published tensor on the way.
    """

    ours: str
    copies: tuple[tuple[Source, ...], ...]
    is_bank: bool
    change: Change = AS_IS


def rename(ours: str, *published: Source, change: Change = AS_IS) -> Rule:
    """A tensor without copies: embedding, head, buffer; several published ones lie row on row in it."""
    return Rule(ours, (published,), False, change)


def bank(ours: str, *copies: Source | Sequence[Source], change: Change = AS_IS) -> Rule:
    """A bank.

    Args:
        ours: name of the parameter ``(G, ...)``.
        copies: the published tensor of each copy, or the several that lie row on row in it, gate before up.
        change: of each published tensor.

    Example:
        >>> bank("q_proj.weight", "q_proj.weight", "q_proj_moe_gen.weight").copies
        (('q_proj.weight',), ('q_proj_moe_gen.weight',))
    """
    listed = (((copy,) if isinstance(copy, Source) else tuple(copy)) for copy in copies)
    return Rule(ours, tuple(listed), True, change)


@dataclass(frozen=True)
class Piece:
    """A published tensor, or rows of it, and the place of its numbers in one of ours.

    Args:
        ours: name of our tensor.
        region: the slice of our tensor, after the leading axis of a bank the rows of the copy.
        published: name of the published tensor.
        rows: its rows; None for all of them.
        change: from the published form to ours.
        shape: of the published tensor, or of those rows.
    """

    ours: str
    region: tuple[slice, ...]
    published: str
    rows: tuple[int, int] | None
    change: Change
    shape: Shape

    def place(self, tensor: Tensor) -> Tensor:
        """The view of our tensor that the piece fills, without the axis of a bank."""
        view = tensor[self.region]
        return view.squeeze(0) if len(self.region) == 2 else view


@dataclass(frozen=True)
class Plan:
    """A table, expanded for one model.

    Args:
        pieces: in the order of our tensors, and in each in the order of its memory.
        ours: shape of each of our tensors that a rule names.
        published: shape of each published tensor.
    """

    pieces: tuple[Piece, ...]
    ours: dict[str, Shape]
    published: dict[str, Shape]

    def by_ours(self) -> dict[str, list[Piece]]:
        """The pieces of each of our tensors, in the order of its memory."""
        found: dict[str, list[Piece]] = {name: [] for name in self.ours}
        for piece in self.pieces:
            found[piece.ours].append(piece)
        return found

    def by_published(self) -> dict[str, list[Piece]]:
        """The pieces of each published tensor, in the order of its memory."""
        found: dict[str, list[Piece]] = {name: [] for name in self.published}
        for piece in self.pieces:
            found[piece.published].append(piece)
        for pieces in found.values():
            pieces.sort(key=lambda piece: piece.rows or (0, 0))
        return found


def make_plan(rules: Iterable[Rule], shapes: Mapping[str, Shape], *, fresh: Iterable[str] = ()) -> Plan:
    """Expands a table for a model and holds it to tile both sides.

    Args:
        rules: the table.
        shapes: of every tensor of the model that is stored.
        fresh: names that no published tensor gives and that keep their start.

    Raises:
        RuleError: if a tensor of the model has no rule or two, a rule names no tensor, or the pieces of a tensor leave
            a hole, overlap, or do not fit.
    """
    pieces: list[Piece] = []
    seen: dict[str, Shape] = {}
    for rule in rules:
        if rule.ours not in shapes:
            raise RuleError(f"a rule gives {rule.ours}, which the model does not have")
        if rule.ours in seen:
            raise RuleError(f"two rules give {rule.ours}")
        seen[rule.ours] = tuple(shapes[rule.ours])
        pieces += _pieces_of(rule, seen[rule.ours])
    without = [name for name in shapes if name not in seen and name not in set(fresh)]
    if without:
        raise RuleError(f"{len(without)} tensors of the model have no rule, {without[0]} for one")
    return Plan(tuple(pieces), seen, _published_shapes(pieces))


def _pieces_of(rule: Rule, shape: Shape) -> list[Piece]:
    if rule.is_bank and len(shape) < 2:
        raise RuleError(f"{rule.ours} {shape} has copies of single numbers, which no rule gives")
    if rule.is_bank and shape[0] != len(rule.copies):
        raise RuleError(f"{rule.ours} has {shape[0]} copies, and its rule gives {len(rule.copies)}")
    height = shape[1] if rule.is_bank else (shape[0] if shape else 1)
    pieces: list[Piece] = []
    for index, sources in enumerate(rule.copies):
        start = 0
        for source, rows in zip(sources, _rows_of(rule, sources, height), strict=True):
            region: tuple[slice, ...] = (slice(start, start + rows),) if shape else ()
            ours = (rows, *shape[2:]) if rule.is_bank else (rows, *shape[1:]) if shape else ()
            if rule.is_bank:
                region = (slice(index, index + 1), *region)
            published = tuple(rule.change.back(torch.empty(ours, device="meta")).shape)
            name, taken = source if isinstance(source, str) else source.name, None
            if isinstance(source, Rows):
                taken = (source.start, source.stop)
                if published[0] != source.stop - source.start:
                    raise RuleError(
                        f"{rule.ours} takes {published[0]} rows of {name}, and its rule gives {taken[0]} to {taken[1]}"
                    )
            pieces.append(Piece(rule.ours, region, name, taken, rule.change, published))
            start += rows
    return pieces


def _rows_of(rule: Rule, sources: tuple[Source, ...], height: int) -> list[int]:
    """Rows of our tensor that each part of a copy fills."""
    told = [source.rows if isinstance(source, Part) else None for source in sources]
    open_parts = told.count(None)
    left = height - sum(rows for rows in told if rows is not None)
    if left < 0 or (open_parts == 0 and left) or (open_parts and left % open_parts):
        raise RuleError(f"the {height} rows of {rule.ours} do not divide over the {len(sources)} parts of its rule")
    return [left // open_parts if rows is None else rows for rows in told]


def _published_shapes(pieces: list[Piece]) -> dict[str, Shape]:
    spans: dict[str, list[Piece]] = {}
    for piece in pieces:
        spans.setdefault(piece.published, []).append(piece)
    shapes = {}
    for name, found in spans.items():
        if len(found) == 1 and found[0].rows is None:
            shapes[name] = found[0].shape
            continue
        end = 0
        for start, stop in sorted(piece.rows or (-1, -1) for piece in found):
            if start != end:
                raise RuleError(f"the rules that take {name} leave a hole or overlap at row {min(start, end)}")
            end = stop
        shapes[name] = (end, *found[0].shape[1:])
    return shapes

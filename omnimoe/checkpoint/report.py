"""What does not fit between a checkpoint and its model, in words."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

_PLACE = re.compile(r"(?<=[.])\d+(?=[.])")
"""A number in a key: of a layer, of an expert."""


def complaint(report: dict[str, Any]) -> str:
    """What does not fit, by kind, layers taken together, at most ten lines a kind; empty where all fits.

    Args:
        report: transformers' loading info.
    """
    parts: list[str] = []
    for kind in ("missing", "unexpected"):
        keys = sorted(report.get(f"{kind}_keys") or ())
        groups: dict[str, list[str]] = {}
        for key in keys:
            groups.setdefault(_PLACE.sub("*", key), []).append(key)
        lines = [found[0] if len(found) == 1 else _together(pattern, found) for pattern, found in groups.items()]
        parts += _listed(kind, len(keys), lines)
    shapes = sorted(report.get("mismatched_keys") or ())
    lines = [f"{key}: {tuple(held)} in the file, {tuple(want)} in the model" for key, held, want in shapes]
    parts += _listed("misshapen", len(shapes), lines)
    return "\n".join([*parts, *map(str, report.get("error_msgs") or ())])


def _together(pattern: str, keys: list[str]) -> str:
    """Keys that differ in numbers alone, as one line: a number where all have it, else which there are."""
    columns = zip(*(map(int, _PLACE.findall(key)) for key in keys), strict=True)
    line = pattern
    for column in columns:
        numbers = sorted(set(column))
        told = str(numbers[0]) if len(numbers) == 1 else f"{{{_numbers(numbers)}}}"
        line = line.replace("*", told, 1)
    return f"{line} ({len(keys)} times)"


def _numbers(numbers: list[int]) -> str:
    """Runs of numbers, the first eight of them.

    Example:
        >>> _numbers([0, 1, 2, 7])
        '0-2,7'
    """
    runs = runs_of(numbers)
    told = ["-".join(map(str, run)) for run in runs[:8]]
    return ",".join([*told, *(["..."] if len(runs) > 8 else [])])


def runs_of(numbers: Iterable[int]) -> list[list[int]]:
    """First and last of each run of sorted numbers; one number where a run has no other."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1] = [runs[-1][0], number]
        else:
            runs.append([number])
    return runs


def _listed(kind: str, count: int, lines: list[str]) -> list[str]:
    if not lines:
        return []
    more = [f"  and {len(lines) - 10} more"] if len(lines) > 10 else []
    return [f"{count} {kind}:", *(f"  {line}" for line in lines[:10]), *more]

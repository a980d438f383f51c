"""What does not fit between a checkpoint and its model, in words."""

from __future__ import annotations

import re
from typing import Any


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
            groups.setdefault(re.sub(r"[.]\d+[.]", ".*.", key), []).append(key)
        lines = [
            found[0] if len(found) == 1 else f"{pattern} ({len(found)} times)" for pattern, found in groups.items()
        ]
        parts += _listed(kind, len(keys), lines)
    shapes = sorted(report.get("mismatched_keys") or ())
    lines = [f"{key}: {tuple(held)} in the file, {tuple(want)} in the model" for key, held, want in shapes]
    parts += _listed("misshapen", len(shapes), lines)
    return "\n".join([*parts, *map(str, report.get("error_msgs") or ())])


def _listed(kind: str, count: int, lines: list[str]) -> list[str]:
    if not lines:
        return []
    more = [f"  and {len(lines) - 10} more"] if len(lines) > 10 else []
    return [f"{count} {kind}:", *(f"  {line}" for line in lines[:10]), *more]

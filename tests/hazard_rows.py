"""What can go wrong with a model, a file or a run, by row, and how many cases each row has at least.

A test belongs to a row by ``@pytest.mark.hazard(row)``; each of its parameters is a case. What the rows are, and where
their tests lie, stands in docs/checkpoints.md.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import pytest

CASES = {
    **{1: 45, 3: 10, 4: 4, 5: 16, 6: 10, 7: 8, 8: 14, 9: 12, 10: 8, 11: 4},
    **{12: 20, 13: 12, 14: 5, 15: 5, 16: 10, 17: 28, 18: 9, 19: 12, 20: 8, 21: 8},
    **{22: 10, 23: 3, 24: 5, 25: 4, 26: 6, 27: 10, 28: 3, 29: 8, 30: 12, 31: 12, 32: 8, 33: 6},
}
"""Cases of each row, 335 in all."""

EXAMPLES = {1: 300, 2: 500}
"""Generated examples beside them: headers by hypothesis, and mutations of a saved model by seed."""


@dataclass(frozen=True)
class Collected:
    """What a run of pytest collected: cases by row, and the test files they are from."""

    cases: Counter[int]
    files: frozenset[Path]


COLLECTED = pytest.StashKey[Collected]()


def collected(items: Iterable[pytest.Item]) -> Collected:
    """Counts the cases of each row; a case with several markers counts in each of their rows."""
    cases: Counter[int] = Counter()
    files = set()
    for item in items:
        rows = {row for marker in item.iter_markers("hazard") for row in marker.args}
        cases.update(rows)
        files.add(item.path)
    return Collected(cases=cases, files=frozenset(files))

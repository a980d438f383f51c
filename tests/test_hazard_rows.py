"""Each way to go wrong has as many cases as it is said to have."""

from __future__ import annotations

from tests.hazard_rows import CASES, EXAMPLES


def test_the_table_has_its_sums():
    assert sum(CASES.values()) == 335
    assert sum(EXAMPLES.values()) == 800

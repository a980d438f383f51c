"""Each way to go wrong has as many cases as it is said to have; counted where all of their files are collected."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.hazard_rows import CASES, COLLECTED, EXAMPLES, Collected

HERE = Path(__file__).parent
PAGE = HERE.parent / "docs" / "checkpoints.md"


@pytest.fixture
def found(request) -> Collected:
    """What this run collected, if that is all."""
    held = request.config.stash[COLLECTED]
    wanted = {path for path in HERE.rglob("test_*.py") if re.search(r"\bhazard\(", path.read_text(encoding="utf-8"))}
    if not wanted - {Path(__file__)} <= held.files:
        pytest.skip("the other files with cases are not collected in this run")
    return held


def test_the_table_has_its_sums():
    assert sum(CASES.values()) == 335
    assert sum(EXAMPLES.values()) == 800


@pytest.mark.parametrize("row", CASES)
def test_a_row_has_its_cases(row, found):
    assert found.cases[row].total() >= CASES[row]


def test_the_page_says_where_they_are(found):
    told = re.findall(
        r"^\| (\d+) \| [^|]+ \| (\d+)[^|]* \| ([^|]+) \|$", PAGE.read_text(encoding="utf-8"), re.MULTILINE
    )
    assert {int(row): int(count) for row, count, _ in told} == CASES | {2: EXAMPLES[2]}
    for row, _, files in told:
        named = set(re.findall(r"`([^`]+)`", files))
        assert named, f"row {row}"
        assert named <= {path.relative_to(HERE).as_posix() for path in found.cases[int(row)]}, f"row {row}"

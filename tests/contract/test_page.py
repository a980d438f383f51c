"""The page of promises: the test that each line names is there, and is as slow as the line says."""

from __future__ import annotations

import ast
import functools
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
LINES = (ROOT / "docs/contract.md").read_text(encoding="utf-8").splitlines()
ROWS = [[cell.strip() for cell in f"{line} ".split("| ")[1:-1]] for line in LINES if line.startswith("| ")]
PROMISES = [row for row in ROWS if row != ["feature", "spelling", "test"]]


@functools.cache
def named_in(path: Path) -> dict[str, bool]:
    """Names of the classes and tests of a file, and whether each is left out unless asked for."""
    found: dict[str, bool] = {}

    def read(body: list[ast.stmt], is_slow: bool) -> None:
        for held in body:
            if isinstance(held, ast.Assign) and "pytestmark" in ast.unparse(held.targets[0]):
                is_slow = "mark.slow" in ast.unparse(held.value)
            if isinstance(held, ast.ClassDef | ast.FunctionDef):
                own = is_slow or "pytest.mark.slow" in map(ast.unparse, held.decorator_list)
                if isinstance(held, ast.ClassDef) and held.name.startswith("Test"):
                    read(held.body, own)
                if held.name.startswith(("Test", "test")):
                    found[held.name] = own

    read(ast.parse(path.read_text(encoding="utf-8")).body, False)
    return found


def test_the_page_is_read():
    assert len(PROMISES) > 80
    assert [row for row in PROMISES if len(row) != 3] == []


@pytest.mark.parametrize("row", PROMISES, ids=lambda row: row[0][:50])
def test_the_test_of_a_promise_is_there(row):
    places = re.findall(r"(tests/[\w./]+)(?:::(\w+))?(?:::(\w+))?`?( \(slow\))?", row[-1])
    assert places, f"no test is named for {row[0]!r}"
    for path, *names, slow in places:
        place = ROOT / path
        assert place.exists(), f"{path} is not there"
        files = sorted(place.rglob("test_*.py")) if place.is_dir() else [place]
        held = {name: is_slow for file in files for name, is_slow in named_in(file).items()}
        for name in filter(None, names):
            assert name in held, f"{path} has no {name}"
        asked = [held[name] for name in filter(None, names)] or list(held.values())
        assert any(asked) if slow else not all(asked), f"{path} is {'not ' if slow else ''}slow"

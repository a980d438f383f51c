"""Each way to go wrong has as many cases as it is said to have; counted where all of their files are collected."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
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


def cases_in(path: Path) -> Iterator[ast.FunctionDef]:
    """The tests of a file that are cases of a row."""

    def within(body: list[ast.stmt], is_marked: bool) -> Iterator[ast.FunctionDef]:
        for part in body:
            if isinstance(part, ast.ClassDef | ast.FunctionDef):
                own = is_marked or any("hazard(" in ast.unparse(held) for held in part.decorator_list)
                if isinstance(part, ast.ClassDef):
                    yield from within(part.body, own)
                elif own:
                    yield part

    module = ast.parse(path.read_text(encoding="utf-8"))
    whole = any(isinstance(part, ast.Assign) and "hazard(" in ast.unparse(part) for part in module.body)
    yield from within(module.body, whole)


FILES = [path for path in sorted(HERE.rglob("test_*.py")) if ".hazard(" in path.read_text(encoding="utf-8")]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(HERE).as_posix())
def test_a_case_that_raises_is_held_to_the_words(path):
    """No case is content with the type of an error; and no type is one that any mistake has."""
    for test in cases_in(path):
        text = ast.unparse(test)
        for held in (held for part in ast.walk(test) if isinstance(part, ast.With) for held in part.items):
            call = held.context_expr
            if not isinstance(call, ast.Call) or ast.unparse(call.func) not in ("pytest.raises", "refused"):
                continue
            where = f"{test.name}, line {call.lineno}"
            assert not {"Exception", "BaseException"} & {ast.unparse(given) for given in call.args}, where
            if ast.unparse(call.func) == "pytest.raises":
                name = ast.unparse(held.optional_vars) if held.optional_vars else ""
                is_read = bool(name) and f"{name}.value" in text
                assert is_read or "match" in [given.arg for given in call.keywords], where


def test_the_page_says_where_they_are(found):
    told = re.findall(
        r"^\| (\d+) \| [^|]+ \| (\d+)[^|]* \| ([^|]+) \|$", PAGE.read_text(encoding="utf-8"), re.MULTILINE
    )
    assert {int(row): int(count) for row, count, _ in told} == CASES | {2: EXAMPLES[2]}
    for row, _, files in told:
        named = set(re.findall(r"`([^`]+)`", files))
        assert named, f"row {row}"
        assert named <= {path.relative_to(HERE).as_posix() for path in found.cases[int(row)]}, f"row {row}"

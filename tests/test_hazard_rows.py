"""Each way to go wrong has as many cases as it is said to have; counted where all of their files are collected."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.hazard_rows import CASES, COLLECTED, EXAMPLES, IN_OTHER_WORDS, Collected
from tests.hazard_rules import CONFINED, cases_in, complaints, name_of, reached_from

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


FILES = [path for path in sorted(HERE.rglob("test_*.py")) if "mark.hazard(" in path.read_text(encoding="utf-8")]
FILES.remove(Path(__file__))
LISTED = {f"{file}::{name}" for file, names in IN_OTHER_WORDS.items() for name in names}


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(HERE).as_posix())
def test_a_case_is_held_to_type_words_and_what_it_leaves(path):
    """And what could take memory, fill a disk, end the process or run code does so in a child."""
    cases = list(cases_in(path))
    assert cases
    assert [told for case in cases for told in complaints(case, LISTED)] == []


def test_what_is_listed_is_there():
    reached = {name_of(place) for path in FILES for case in cases_in(path) for place in reached_from(case)}
    assert not LISTED - reached


BEGIN = """
import contextlib
import pytest
from tests.children import capped
from tests.checkpoint.test_killed import killed
from tests.refusals import refused, unchanged

def quietly(act):
    try:
        act()
    except ValueError:
        return

def asked(act):
    with refused((), "no", ValueError):
        act()
"""
CARELESS = {
    "no more than words": ("with pytest.raises(ValueError, match='no'):\n        act()", "pytest.raises"),
    "no words": ("with pytest.raises(ValueError):\n        act()", "compares nothing with how it was"),
    "no refusal": ("act()", "compares nothing with how it was"),
    "both": ("asked(act)\n    with pytest.raises(ValueError, match='no'):\n        act()", "pytest.raises"),
    "caught": ("asked(act)\n    try:\n        act()\n    except ValueError:\n        pass", "except"),
    "passed over": ("asked(act)\n    with contextlib.suppress(ValueError):\n        act()", "contextlib.suppress"),
    "in a helper": ("asked(act)\n    quietly(act)", "quietly, line"),
    "in the helper of another file": ("asked(act)\n    killed(act)", "checkpoint/test_killed.py::killed, line"),
    "in a fixture": ("asked(quietly)", "quietly, line"),
    "any message": ("with refused((), '', ValueError):\n        act()", "any message would do"),
    "any error": ("with refused((), 'no', Exception):\n        act()", "any error would do"),
}


@pytest.mark.parametrize("way", CARELESS)
@pytest.mark.parametrize("mark", ["decorator", "file", "class"])
def test_a_careless_case_is_found(way, mark, tmp_path):
    body, told = CARELESS[way]
    marks = {"decorator": "@pytest.mark.hazard(8)\n", "file": "pytestmark = pytest.mark.hazard(8)\n\n"}
    source = f"{marks.get(mark, '')}def test_it(act):\n    {body}\n"
    if mark == "class":
        indented = source.replace("\n", "\n    ").replace("test_it(act", "test_it(self, act")
        source = f"@pytest.mark.hazard(8)\nclass TestIt:\n    {indented}\n"
    (case,) = cases_in(written(tmp_path, source))
    assert any(told in line for line in complaints(case)), complaints(case)
    helpers = {"checkpoint/test_killed.py::killed", f"{case.path.name}::quietly"}
    assert complaints(case, {case.name, *helpers}) == []


@pytest.mark.parametrize("row", CONFINED)
def test_a_destructive_case_out_of_a_child_is_found(row, tmp_path):
    source = "@pytest.mark.hazard({row})\n{capped}def test_it(act):\n    asked(act)\n"
    (free,) = cases_in(written(tmp_path, source.format(row=f"7, {row}", capped="")))
    assert "runs in the process of the tests" in complaints(free)[0]
    (held,) = cases_in(written(tmp_path, source.format(row=row, capped="@capped(1 << 20)\n"), "test_held.py"))
    assert complaints(held) == []


@pytest.mark.parametrize("body", ["asked(act)", "with unchanged(act):\n        act()"])
def test_a_careful_case_is_not(body, tmp_path):
    (case,) = cases_in(written(tmp_path, f"@pytest.mark.hazard(8)\ndef test_it(act):\n    {body}\n"))
    assert complaints(case) == []


def written(folder: Path, source: str, name: str = "test_it.py") -> Path:
    (folder / name).write_text(BEGIN + source)
    return folder / name


def test_the_page_says_where_they_are(found):
    told = re.findall(
        r"^\| (\d+) \| [^|]+ \| (\d+)[^|]* \| ([^|]+) \|$", PAGE.read_text(encoding="utf-8"), re.MULTILINE
    )
    assert {int(row): int(count) for row, count, _ in told} == CASES | {2: EXAMPLES[2]}
    for row, _, files in told:
        named = set(re.findall(r"`([^`]+)`", files))
        assert named, f"row {row}"
        assert named <= {path.relative_to(HERE).as_posix() for path in found.cases[int(row)]}, f"row {row}"

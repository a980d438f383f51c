"""Each way to go wrong has as many cases as it is said to have; counted where all of their files are collected."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.checkpoint.test_mutations import EACH
from tests.hazard_rows import CASES, COLLECTED, EXAMPLES, IN_OTHER_WORDS, Collected
from tests.hazard_rules import CONFINED, cases_in, complaints, name_of, reached_from
from tests.sources import defined

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


def test_the_generated_examples_are_as_many(found):
    """Each case of row 2 is a block of seeds; those of row 1 are counted where they are made."""
    assert found.cases[2].total() * EACH >= EXAMPLES[2]


def test_the_source_shows_every_case_that_is_collected(found):
    """By whatever marks it is one, and for rows that want a child by marks that say which."""
    read = {(case.path, case.node.name): case.rows for path in FILES for case in cases_in(path)}
    assert not set(found.tests) - set(read)
    hidden = {place: set(CONFINED) & rows - read[place] for place, rows in found.tests.items()}
    assert not {place: rows for place, rows in hidden.items() if rows}


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
import functools
import pytest
import pytest as other
from pytest import raises as held_to
from tests import refusals
from tests.children import capped, in_child
from tests.checkpoint.test_killed import killed
from tests.refusals import refused, unchanged

takes = pytest.raises
CAP = capped(1 << 20)
alone = lambda act: pytest.raises(ValueError, act)
TABLE = {"one": lambda act: pytest.raises(ValueError, act)}

def quietly(act):
    try:
        act()
    except ValueError:
        return

def asked(act):
    with refused([1], "no", ValueError):
        act()

class Helper:
    def quietly(self, act):
        with pytest.raises(ValueError, match="no"):
            act()

@pytest.fixture
def inner():
    with pytest.raises(ValueError, match="no"):
        int("x")

@pytest.fixture(name="outer")
def of_another_name(inner):
    return inner

@pytest.fixture
def child():
    in_child(lambda: 1)

def beside_a_child(test):
    @functools.wraps(test)
    def run(act):
        in_child(lambda: 1)
        test(act)
    return run

def in_a_child(test):
    @functools.wraps(test)
    def run(act):
        in_child(lambda: test(act))
    return run

"""
CARELESS = {
    "no more than words": ("with pytest.raises(ValueError, match='no'):\n        act()", "pytest.raises"),
    "no words": ("with pytest.raises(ValueError):\n        act()", "compares nothing with how it was"),
    "no refusal": ("act()", "compares nothing with how it was"),
    "a refusal that is named alone": ("refused\n    act()", "compares nothing with how it was"),
    "a refusal that is not gone into": ("refused(act, 'no')\n    act()", "compares nothing with how it was"),
    "both": ("asked(act)\n    with pytest.raises(ValueError, match='no'):\n        act()", "pytest.raises"),
    "by another module": ("asked(act)\n    with other.raises(ValueError):\n        act()", "other.raises"),
    "by another name": ("asked(act)\n    with held_to(ValueError):\n        act()", "raises"),
    "by a name for it": ("asked(act)\n    with takes(ValueError):\n        act()", "::takes, line"),
    "caught": ("asked(act)\n    try:\n        act()\n    except ValueError:\n        pass", "except"),
    "passed over": ("asked(act)\n    with contextlib.suppress(ValueError):\n        act()", "contextlib.suppress"),
    "in a helper": ("asked(act)\n    quietly(act)", "quietly, line"),
    "in the helper of another file": ("asked(act)\n    killed(act)", "checkpoint/test_killed.py::killed, line"),
    "in a class of helpers": ("asked(act)\n    Helper().quietly(act)", "::Helper, line"),
    "in a function without a name": ("asked(act)\n    alone(act)", "::alone, line"),
    "in a table": ("asked(act)\n    TABLE['one'](act)", "::TABLE, line"),
    "in an argument": ("asked(quietly)", "quietly, line"),
    "in the fixture of a fixture": ("asked(act)\n    request.getfixturevalue('outer')", "::inner, line"),
    "any message": ("with refused([1], '', ValueError):\n        act()", "any message would do"),
    "any error": ("with refused([1], 'no', Exception):\n        act()", "any error would do"),
    "any error of some": ("with refused([1], 'no', (ValueError, Exception)):\n        act()", "any error would do"),
    "any outcome": ("with refused([1], 'no', is_sure=False):\n        act()", "nobody asks whether it was refused"),
    "an outcome that is not looked at": (
        "with refused([1], 'no', is_sure=False) as told:\n        act()",
        "nobody asks whether it was refused",
    ),
}
MARKS = {
    "decorator": "@pytest.mark.hazard(8)\n{test}",
    "file": "pytestmark = pytest.mark.hazard(8)\n{test}",
    "annotated": "pytestmark: object = pytest.mark.hazard(8)\n{test}",
    "condition": "@pytest.mark.hazard(8)\n{test}",
    "class": "@pytest.mark.hazard(8)\n{test}",
    "in the class": "pytestmark = [pytest.mark.hazard(8)]\n{test}",
}
OUTER = {
    "condition": "if pytest:\n    {}\n",
    "class": "class TestIt:\n    {}\n",
    "in the class": "class TestIt:\n    {}\n",
}


@pytest.mark.parametrize("way", CARELESS)
@pytest.mark.parametrize("mark", MARKS)
def test_a_careless_case_is_found(way, mark, tmp_path):
    body, told = CARELESS[way]
    source = MARKS[mark].format(test=f"def test_it(act):\n    {body}\n")
    if mark in OUTER:
        source = OUTER[mark].format(source.replace("\n", "\n    "))
    (case,) = cases_in(written(tmp_path, source))
    assert any(told in line for line in complaints(case)), complaints(case)
    everything = {name_of((case.path, name)) for name in defined(case.path)}
    assert complaints(case, {"checkpoint/test_killed.py::killed", *everything}) == []


METHODS = """
class Base:
    def of_another(self, act):
        with pytest.raises(ValueError, match="no"):
            act()

@pytest.mark.hazard(8)
class TestIt(Base):
    def own(self, act):
        quietly(act)

    @pytest.fixture
    def of_the_class(self, inner):
        return inner

    {marks}
    def test_it(self, act{fixture}):
        asked(act)
        {body}
"""


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"body": "self.own(act)"}, "::quietly, line"),
        ({"body": "self.of_another(act)"}, "::Base, line"),
        ({"fixture": ", of_the_class"}, "::inner, line"),
        ({"marks": "@pytest.mark.usefixtures('of_the_class')"}, "::inner, line"),
        ({}, None),
    ],
    ids=str,
)
def test_methods_and_fixtures_of_a_class_are_followed(given, told, tmp_path):
    source = METHODS.format(**{"marks": "", "fixture": "", "body": "pass", **given})
    (case,) = cases_in(written(tmp_path, source))
    found = complaints(case)
    assert any(told in line for line in found) if told else found == []


def test_fixtures_that_nobody_asks_for_and_those_of_the_folder_are_followed(tmp_path):
    fixture = "import pytest\n@pytest.fixture{}\ndef far():\n    with pytest.raises(ValueError):\n        int('x')\n"
    (tmp_path / "conftest.py").write_text(fixture.format("(autouse=True)"))
    (case,) = cases_in(written(tmp_path, "@pytest.mark.hazard(8)\ndef test_it(act):\n    asked(act)\n"))
    assert "conftest.py::far, line 4: pytest.raises" in complaints(case)


DESTRUCTIVE = {
    "free": "def test_it(act):\n    asked(act)\n",
    "through a fixture only": "def test_it(act, child):\n    asked(act)\n",
    "after a child": "def test_it(act):\n    in_child(lambda: 1)\n    asked(act)\n",
    "beside a function in a child": (
        "def test_it(act):\n    def it():\n        return 1\n    in_child(it)\n"
        "    with unchanged(act):\n        act()\n"
    ),
    "by a decorator beside it": "@beside_a_child\ndef test_it(act):\n    asked(act)\n",
    "capped parameters": "@pytest.mark.parametrize('act', [capped])\ndef test_it(act):\n    asked(act)\n",
}
CONTAINED = {
    "capped": "@capped(1 << 20)\ndef test_it(act):\n    asked(act)\n",
    "by a name for it": "@CAP\ndef test_it(act):\n    asked(act)\n",
    "by a decorator": "@in_a_child\ndef test_it(act):\n    asked(act)\n",
    "handed in": "def test_it(act):\n    def it():\n        asked(act)\n    in_child(it)\n",
}


@pytest.mark.parametrize("row", CONFINED)
def test_a_destructive_case_out_of_a_child_is_found(row, tmp_path):
    for number, way in enumerate(DESTRUCTIVE):
        source = f"@pytest.mark.hazard(7, {row})\n{DESTRUCTIVE[way]}"
        (free,) = cases_in(written(tmp_path, source, f"test_{number}.py"))
        assert ["runs in the process of the tests" in told for told in complaints(free)] == [True], way
    for way in CONTAINED:
        (held,) = cases_in(written(tmp_path, f"@pytest.mark.hazard({row})\n{CONTAINED[way]}", f"test_{way}.py"))
        assert complaints(held) == [], way


@pytest.mark.parametrize(
    "body",
    [
        "asked(act)",
        "with unchanged(act):\n        act()",
        "with refused(act, 'no', is_sure=False) as told:\n        act()\n    assert told",
    ],
)
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

"""What the source of every case must show: that a refusal leaves everything as it was, and what is destructive a child.

A case is followed into what it names of the tests: functions, methods, classes, what is assigned, and fixtures.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from tests.sources import (
    HERE,
    Place,
    asked_for,
    at_work,
    class_of,
    defined,
    is_fixture,
    named_by,
    parsed,
    resolved,
    statements,
)

REFUSED = (HERE / "refusals.py", "refused")
CHECKS = {REFUSED, (HERE / "refusals.py", "unchanged")}
"""What compares before with after."""
CONFINED = (1, 2, 3, 4, 6, 12, 14, 24, 25, 26, 28, 29)
"""Rows whose cases could take memory, fill a disk, end the process or run code; others have a few that are too."""
CHILDREN = {(HERE / "children.py", name) for name in ("in_child", "capped", "limited")}
"""What caps: copies of the process, or the process itself and the programs that it starts."""
SWALLOWING = {"raises", "suppress", "RaisesGroup", "RaisesExc", "assertRaises", "assertRaisesRegex"}


def name_of(place: Place) -> str:
    """A function as ``file::name``."""
    path, name = place
    return f"{path.relative_to(HERE).as_posix() if path.is_relative_to(HERE) else path.name}::{name}"


@dataclass(frozen=True)
class Case:
    """A test that belongs to rows.

    Args:
        path: of its file.
        node: its source.
        marks: its decorators, those of its class and of its file.
        outer: the class that it stands in, if any.
    """

    path: Path
    node: ast.FunctionDef
    marks: str
    outer: str = ""

    @property
    def place(self) -> Place:
        return self.path, f"{self.outer}.{self.node.name}" if self.outer else self.node.name

    @property
    def name(self) -> str:
        return name_of(self.place)

    @property
    def rows(self) -> set[int]:
        """Those that its marks spell out."""
        return {int(row) for given in re.findall(r"hazard\(([\d, ]+)\)", self.marks) for row in given.split(",")}


def cases_in(path: Path) -> Iterator[Case]:
    """The tests of a file that are cases of a row; where its parameters are marked, of a test with such parameters."""
    top = list(statements(parsed(path).body))
    assigned = [
        part
        for part in top
        if isinstance(part, ast.Assign | ast.AnnAssign | ast.AugAssign) and "hazard(" in ast.unparse(part)
    ]
    # a function that marks parameters, by which those of a test are made
    marking = [part.name for part in top if isinstance(part, ast.FunctionDef) and "mark.hazard(" in body_of(part)]

    def within(body: list[ast.stmt], outer: str, given: str) -> Iterator[Case]:
        for part in statements(body):
            if not isinstance(part, ast.ClassDef | ast.FunctionDef):
                continue
            marks = given + " ".join(ast.unparse(held) for held in part.decorator_list)
            if isinstance(part, ast.ClassDef):
                own = [ast.unparse(held) for held in part.body if isinstance(held, ast.Assign | ast.AnnAssign)]
                marks += " ".join(held for held in own if held.startswith("pytestmark"))
                yield from within(part.body, f"{outer}.{part.name}".strip("."), marks)
            elif part.name.startswith("test_"):
                is_marked = "hazard(" in marks or any(f"{name}(" in marks for name in marking)
                if is_marked:
                    yield Case(path, part, marks, outer)

    yield from within(parsed(path).body, "", " ".join(ast.unparse(part) for part in assigned))


def body_of(function: ast.FunctionDef) -> str:
    """Its source without its decorators."""
    return "\n".join(ast.unparse(part) for part in function.body)


@cache
def entered_by(path: Path, node: ast.AST) -> dict[int, Place]:
    """Which of the checks a piece of source goes into, by the identity of the call."""
    found = {}
    for part in ast.walk(node):
        for held in part.items if isinstance(part, ast.With) else ():
            call = held.context_expr
            if isinstance(call, ast.Call) and isinstance(call.func, ast.Name):
                place = resolved(path, call.func.id)
                if place in CHECKS:
                    found[id(call)] = place
    return found


@cache
def followed(path: Path, node: ast.AST, outer: str) -> set[Place]:
    """What a piece of source comes to; a check only where it is gone into, since to name it compares nothing."""
    return (named_by(path, node, outer) - CHECKS) | set(entered_by(path, node).values())


def reached_from(case: Case) -> dict[Place, list[ast.AST]]:
    """A case and everything that it comes to, but for what those that check and those that start children do."""
    reached: dict[Place, list[ast.AST]] = {case.place: [case.node]}
    open_ends = [
        *followed(case.path, case.node, case.outer),
        *asked_for(case.path, case.outer, case.node, case.marks),
        *at_work(case.path, case.outer),
    ]
    while open_ends:
        path, name = place = open_ends.pop()
        if place in reached:
            continue
        reached[place] = defined(path)[name]
        for node in reached[place] if place not in CHECKS | CHILDREN else ():
            open_ends += followed(path, node, class_of(place, node))
            if is_fixture(node):
                open_ends += asked_for(path, class_of(place, node), node)
    return reached


@cache
def aliases(path: Path) -> dict[str, str]:
    """What a file imports that takes an error without looking at what it left, by the name it has there."""
    parts = [part for part in ast.walk(parsed(path)) if isinstance(part, ast.ImportFrom)]
    return {held.asname or held.name: held.name for part in parts for held in part.names if held.name in SWALLOWING}


def bare(path: Path, node: ast.AST) -> Iterator[str]:
    """Where a piece of source takes an error without looking at what it left, or names what does."""
    for part in ast.walk(node):
        if isinstance(part, ast.ExceptHandler):
            yield f"line {part.lineno}: except"
        elif isinstance(part, ast.Attribute) and part.attr in SWALLOWING:
            yield f"line {part.lineno}: {ast.unparse(part)}"
        elif isinstance(part, ast.Name) and part.id in aliases(path):
            yield f"line {part.lineno}: {aliases(path)[part.id]}"


def vague(path: Path, node: ast.AST) -> Iterator[str]:
    """Where a refusal is held to no words, to a type that any mistake has, or not even to be one.

    What only the values show is told by ``refused`` itself.
    """
    entered = entered_by(path, node)
    loaded = {part.id for part in ast.walk(node) if isinstance(part, ast.Name) and isinstance(part.ctx, ast.Load)}
    for item in (held for part in ast.walk(node) if isinstance(part, ast.With) for held in part.items):
        part = item.context_expr
        if not isinstance(part, ast.Call) or entered.get(id(part)) != REFUSED:
            continue
        given = [*part.args, *(held.value for held in part.keywords)]
        if any(isinstance(held, ast.Constant) and held.value == "" for held in given):
            yield f"line {part.lineno}: any message would do"
        if {"Exception", "BaseException"} & {held.id for held in ast.walk(part) if isinstance(held, ast.Name)}:
            yield f"line {part.lineno}: any error would do"
        name = item.optional_vars
        if "is_sure" in {held.arg for held in part.keywords} and not (isinstance(name, ast.Name) and name.id in loaded):
            yield f"line {part.lineno}: nobody asks whether it was refused"


@cache
def careless(path: Path, node: ast.AST) -> tuple[str, ...]:
    """Both of these."""
    return (*bare(path, node), *vague(path, node))


def complaints(case: Case, listed: Collection[str] = ()) -> list[str]:
    """What a case does not show.

    Args:
        case: the test.
        listed: functions that say by other means that nothing was harmed, as ``file::name``.
    """
    reached = reached_from(case)
    asserting = {place: nodes for place, nodes in reached.items() if place not in CHECKS | CHILDREN}
    names = {place: name_of(place) for place in asserting}
    found = [
        f"{names[place]}, {text}"
        for place, nodes in asserting.items()
        if names[place] not in listed
        for node in nodes
        for text in careless(place[0], node)
    ]
    if not CHECKS & set(reached) and not set(names.values()) & set(listed):
        found.append(f"{case.name} compares nothing with how it was; use refused or unchanged of tests/refusals.py")
    if set(CONFINED) & case.rows and not is_confined(case):
        found.append(f"{case.name} runs in the process of the tests; use capped of tests/children.py")
    return found


def is_confined(case: Case) -> bool:
    """Whether a case runs in a child, or hands all that it checks to one; what its fixtures do does not count."""
    decorators = [held for held in case.node.decorator_list if not ast.unparse(held).startswith("pytest.mark.")]
    if any(confines(case.path, held) for held in decorators):
        return True
    is_started, seen = False, {case.place}
    body = ast.Module(body=case.node.body, type_ignores=[])
    open_ends: list[tuple[Path, str, ast.AST]] = [(case.path, case.outer, body)]
    while open_ends:
        path, outer, node = open_ends.pop()
        entered = entered_by(path, node)
        for part in outside(path, node):
            if id(part) in entered:
                return False
            is_started |= starts_child(path, part)
            named = named_by(path, part, outer) if isinstance(part, ast.Name | ast.Attribute) else set()
            for place in named - seen - CHECKS - CHILDREN:
                seen.add(place)
                open_ends += [(place[0], class_of(place, held), held) for held in defined(place[0])[place[1]]]
    return is_started


def starts_child(path: Path, node: ast.AST) -> bool:
    """Whether a piece of source is the call by which something is capped."""
    return isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and resolved(path, node.func.id) in CHILDREN


def handed(path: Path, node: ast.AST) -> set[str]:
    """The names of what a piece of source hands to children."""
    calls = [part for part in ast.walk(node) if isinstance(part, ast.Call) and starts_child(path, part)]
    given = [value for call in calls for value in (*call.args, *(held.value for held in call.keywords))]
    return {part.id for value in given for part in ast.walk(value) if isinstance(part, ast.Name)}


def outside(path: Path, node: ast.AST) -> Iterator[ast.AST]:
    """What of a piece of source runs in this process: all but what it hands to children."""
    names = handed(path, node)

    def within(part: ast.AST) -> Iterator[ast.AST]:
        yield part
        if not starts_child(path, part):
            for held in ast.iter_child_nodes(part):
                if not (isinstance(held, ast.FunctionDef) and held.name in names):
                    yield from within(held)

    return within(node)


def confines(path: Path, decorator: ast.AST) -> bool:
    """Whether what a decorator is put on runs in a child."""
    named = named_by(path, decorator)
    if named & CHILDREN:
        return True
    for source, name in named:
        for node in defined(source)[name]:
            if isinstance(node, ast.Assign) and confines(source, node.value):
                return True
            if isinstance(node, ast.FunctionDef) and node.args.args:
                test = node.args.args[0].arg
                wraps = [
                    part for part in ast.walk(node) if isinstance(part, ast.Call) and "wraps" in ast.unparse(part.func)
                ]
                copied = {id(held) for part in wraps for held in ast.walk(part)}
                called = {
                    part.id for part in outside(source, node) if isinstance(part, ast.Name) and id(part) not in copied
                }
                if test in handed(source, node) - called:
                    return True
    return False

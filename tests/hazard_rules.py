"""What the source of every case must show: that a refusal leaves everything as it was, and what is destructive a child.

A case is followed into the functions of tests that it names, fixtures among them.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

HERE = Path(__file__).parent
CHECKS = {(HERE / "refusals.py", name) for name in ("refused", "unchanged")}
"""What compares before with after."""
CONFINED = (1, 2, 3, 4, 6, 14, 28)
"""Rows whose cases could take memory, fill a disk, end the process or run code; others have a few that are too."""
CHILDREN = {(HERE / "children.py", name) for name in ("in_child", "capped")}

Place = tuple[Path, str]


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
    """

    path: Path
    node: ast.FunctionDef
    marks: str

    @property
    def name(self) -> str:
        return name_of((self.path, self.node.name))

    @property
    def rows(self) -> set[int]:
        """Those that its marks spell out."""
        return {int(row) for given in re.findall(r"hazard\(([\d, ]+)\)", self.marks) for row in given.split(",")}


@cache
def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def cases_in(path: Path) -> Iterator[Case]:
    """The tests of a file that are cases of a row; where its parameters are marked, of a test with such parameters."""
    module = parsed(path)
    assigned = [part for part in module.body if isinstance(part, ast.Assign) and "hazard(" in ast.unparse(part)]
    # a function that marks parameters, by which those of a test are made
    marking = [
        part.name for part in module.body if isinstance(part, ast.FunctionDef) and "mark.hazard(" in body_of(part)
    ]

    def within(body: list[ast.stmt], outer: str) -> Iterator[Case]:
        for part in body:
            if not isinstance(part, ast.ClassDef | ast.FunctionDef):
                continue
            marks = outer + " ".join(ast.unparse(held) for held in part.decorator_list)
            if isinstance(part, ast.ClassDef):
                yield from within(part.body, marks)
            elif part.name.startswith("test_"):
                is_marked = "hazard(" in marks or any(f"{name}(" in marks for name in marking)
                if is_marked:
                    yield Case(path, part, marks)

    yield from within(module.body, " ".join(ast.unparse(part) for part in assigned))


def body_of(function: ast.FunctionDef) -> str:
    """Its source without its decorators."""
    return "\n".join(ast.unparse(part) for part in function.body)


@cache
def own_functions(path: Path) -> dict[str, ast.FunctionDef]:
    return {part.name: part for part in parsed(path).body if isinstance(part, ast.FunctionDef)}


@cache
def functions_of(path: Path) -> dict[str, Place]:
    """Every function of tests that names of a file mean, its own and those it imports."""
    found: dict[str, Place] = {}
    for part in ast.walk(parsed(path)):
        if isinstance(part, ast.ImportFrom) and (part.module or "").startswith("tests."):
            source = (HERE.parent / part.module.replace(".", "/")).with_suffix(".py")
            found |= {held.asname or held.name: (source, held.name) for held in part.names if source.exists()}
    return found | {name: (path, name) for name in own_functions(path)}


def named_by(path: Path, node: ast.AST) -> set[Place]:
    """The functions of tests that a piece of source names."""
    functions = functions_of(path)
    return {functions[part.id] for part in ast.walk(node) if isinstance(part, ast.Name) and part.id in functions}


def reached_from(case: Case) -> dict[Place, ast.AST]:
    """A case and every function that it comes to, but for those that check and those that start children."""
    reached: dict[Place, ast.AST] = {(case.path, case.node.name): case.node}
    open_ends = [*named_by(case.path, case.node), *fixtures_of(case)]
    while open_ends:
        path, name = place = open_ends.pop()
        if place in reached:
            continue
        node = next(
            (part for part in parsed(path).body if isinstance(part, ast.FunctionDef) and part.name == name), None
        )
        if node is not None:
            reached[place] = node
            if place not in CHECKS | CHILDREN:
                open_ends += named_by(path, node)
    return reached


def fixtures_of(case: Case) -> list[Place]:
    """The fixtures of its own file that it asks for."""
    own = functions_of(case.path)
    return [own[part.arg] for part in case.node.args.args if part.arg in own]


def bare(node: ast.AST) -> Iterator[str]:
    """Where a piece of source takes an error without looking at what it left."""
    for part in ast.walk(node):
        if isinstance(part, ast.ExceptHandler):
            yield f"line {part.lineno}: except"
        elif isinstance(part, ast.Call) and re.fullmatch(
            r"(pytest\.)?raises|(contextlib\.)?suppress", ast.unparse(part.func)
        ):
            yield f"line {part.lineno}: {ast.unparse(part.func)}"


def vague(node: ast.AST) -> Iterator[str]:
    """Where a refusal is held to no words, or to a type that any mistake has."""
    for part in ast.walk(node):
        if not (isinstance(part, ast.Call) and ast.unparse(part.func) == "refused"):
            continue
        given = [*part.args, *(held.value for held in part.keywords)]
        if any(isinstance(held, ast.Constant) and held.value == "" for held in given):
            yield f"line {part.lineno}: any message would do"
        if {"Exception", "BaseException"} & {ast.unparse(held) for held in given}:
            yield f"line {part.lineno}: any error would do"


def complaints(case: Case, listed: Collection[str] = ()) -> list[str]:
    """What a case does not show.

    Args:
        case: the test.
        listed: functions that say by other means that nothing was harmed, as ``file::name``.
    """
    reached = reached_from(case)
    asserting = {place: node for place, node in reached.items() if place not in CHECKS | CHILDREN}
    names = {place: name_of(place) for place in asserting}
    found = [
        f"{names[place]}, {text}"
        for place, node in asserting.items()
        if names[place] not in listed
        for text in (*bare(node), *vague(node))
    ]
    if not CHECKS & set(reached) and not {case.name, *names.values()} & set(listed):
        found.append(f"{case.name} compares nothing with how it was; use refused or unchanged of tests/refusals.py")
    if set(CONFINED) & case.rows and not CHILDREN & {*reached, *decorators_of(case)}:
        found.append(f"{case.name} runs in the process of the tests; use capped of tests/children.py")
    return found


def decorators_of(case: Case) -> set[Place]:
    """The functions of tests that decorate a case, and those that they name."""
    found = {place for held in case.node.decorator_list for place in named_by(case.path, held)}
    for path, name in list(found):
        own = next(
            (part for part in parsed(path).body if isinstance(part, ast.FunctionDef) and part.name == name), None
        )
        found |= named_by(path, own) if own is not None else set()
    return found

"""What names stand for in the source of tests: functions, classes, what is assigned, fixtures that are asked for."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path

HERE = Path(__file__).parent

Place = tuple[Path, str]
"""A file, and a name at its top; of what stands in a class, after the name of the class and a dot."""


@cache
def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def statements(body: Iterable[ast.AST]) -> Iterator[ast.AST]:
    """Those of a body, also under conditions and the like; not those of the functions and classes in it."""
    for part in body:
        yield part
        if not isinstance(part, ast.ClassDef | ast.FunctionDef):
            for field in ("body", "orelse", "finalbody", "handlers", "cases"):
                yield from statements(getattr(part, field, ()))


@cache
def defined(path: Path) -> dict[str, list[ast.AST]]:
    """Everything of a file that has a name of its own."""
    found: dict[str, list[ast.AST]] = {}

    def within(body: Iterable[ast.AST], outer: str) -> None:
        for part in statements(body):
            if isinstance(part, ast.ClassDef | ast.FunctionDef):
                found.setdefault(outer + part.name, []).append(part)
                if isinstance(part, ast.ClassDef):
                    within(part.body, f"{outer}{part.name}.")
            elif isinstance(part, ast.Assign | ast.AnnAssign | ast.AugAssign):
                targets = part.targets if isinstance(part, ast.Assign) else [part.target]
                for held in (held for target in targets for held in ast.walk(target)):
                    if isinstance(held, ast.Name):
                        found.setdefault(outer + held.id, []).append(part)

    within(parsed(path).body, "")
    return found


@cache
def imports(path: Path) -> tuple[dict[str, Place], dict[str, Path]]:
    """What a file imports from tests: by name, and whole modules."""
    names: dict[str, Place] = {}
    modules: dict[str, Path] = {}
    for part in ast.walk(parsed(path)):
        if isinstance(part, ast.ImportFrom) and re.match(r"tests(\.|$)", part.module or ""):
            source = HERE.parent / str(part.module).replace(".", "/")
            for held in part.names:
                if (source / held.name).with_suffix(".py").exists():
                    modules[held.asname or held.name] = (source / held.name).with_suffix(".py")
                elif source.with_suffix(".py").exists():
                    names[held.asname or held.name] = (source.with_suffix(".py"), held.name)
    return names, modules


def resolved(path: Path, name: str) -> Place | None:
    """Where the thing is defined that a name means in a file; None where it is none of the tests'."""
    if name in defined(path):
        return path, name
    names, _ = imports(path)
    return resolved(*names[name]) if name in names else None


@cache
def named_by(path: Path, node: ast.AST, outer: str = "") -> set[Place]:
    """What of the tests a piece of source names; ``outer`` is the class that it stands in."""
    _, modules = imports(path)
    found: set[Place | None] = set()
    for part in ast.walk(node):
        if isinstance(part, ast.Name):
            found.add(resolved(path, part.id))
        elif isinstance(part, ast.Attribute) and isinstance(part.value, ast.Name):
            if part.value.id in modules:
                found.add(resolved(modules[part.value.id], part.attr))
            elif part.value.id in ("self", "cls"):
                found |= members(path, outer, part.attr)
    return {place for place in found if place is not None}


def members(path: Path, outer: str, name: str) -> set[Place]:
    """What a name means in a class: its own, or else all of the classes that it is made of."""
    if f"{outer}.{name}" in defined(path):
        return {(path, f"{outer}.{name}")}
    classes = [part for part in defined(path).get(outer, []) if isinstance(part, ast.ClassDef)]
    return {place for part in classes for base in part.bases for place in named_by(path, base)}


def class_of(place: Place, node: ast.AST) -> str:
    """The class whose ``self`` is meant in what stands at a place."""
    return place[1] if isinstance(node, ast.ClassDef) else place[1].rpartition(".")[0]


@cache
def is_fixture(node: ast.AST, *, words: str = "") -> bool:
    return isinstance(node, ast.FunctionDef) and any(
        "fixture" in (text := ast.unparse(held)) and words in text for held in node.decorator_list
    )


@cache
def fixtures_in(path: Path, outer: str) -> dict[str, Place]:
    """The fixtures of a class, or of the file itself where ``outer`` is empty, by the names to ask for them."""
    places = {(path, name) for name in defined(path) if name.rpartition(".")[0] == outer}
    if not outer:
        places |= {place for name in imports(path)[0] if (place := resolved(path, name)) is not None}
    found = {}
    for source, name in places:
        for node in defined(source)[name]:
            if is_fixture(node):
                given = re.search(r"\bname='(\w+)'", " ".join(map(ast.unparse, node.decorator_list)))
                found[given[1] if given else name.rpartition(".")[2]] = (source, name)
    return found


def fixtures_for(path: Path, outer: str) -> list[dict[str, Place]]:
    """Those that a test or fixture may ask for, nearest first: of its class, its file, and the folders above."""
    inside = [fixtures_in(path, outer)] if outer else []
    folders = [path.parent, *(path.parents if path.is_relative_to(HERE) else ())]
    above = {folder / "conftest.py": None for folder in folders if folder.is_relative_to(HERE) or folder == path.parent}
    return [*inside, fixtures_in(path, ""), *(fixtures_in(held, "") for held in above if held.exists())]


@cache
def asked_for(path: Path, outer: str, node: ast.FunctionDef, marks: str = "") -> set[Place]:
    """The fixtures of a test or fixture: by its parameters, by its marks, and by their names as it runs."""
    given = node.args
    names = {held.arg for held in (*given.posonlyargs, *given.args, *given.kwonlyargs)}
    for text in re.findall(r"(?:usefixtures|getfixturevalue)\(([^)]*)\)", marks + ast.unparse(node)):
        names |= set(re.findall(r"'(\w+)'", text))
    known = fixtures_for(path, outer)
    return {place for name in names for place in [next((held[name] for held in known if name in held), None)] if place}


@cache
def at_work(path: Path, outer: str) -> set[Place]:
    """The fixtures that nobody needs to ask for."""
    return {
        (source, name)
        for held in fixtures_for(path, outer)
        for source, name in held.values()
        if any(is_fixture(node, words="autouse=True") for node in defined(source)[name])
    }

"""Every page for readers: links lead somewhere, commands are taken, imports work, files that are named are there."""

from __future__ import annotations

import argparse
import ast
import fnmatch
import functools
import pkgutil
import re
import shlex
import textwrap
from pathlib import Path
from typing import Any

import pytest

from omnimoe import list_models
from omnimoe.cli import COMMANDS, _parser
from omnimoe.model import MODELS
from omnimoe.routers import ROUTERS

ROOT = Path(__file__).parents[1]
FOLDERS = (ROOT, ROOT / "docs", *sorted(path for path in (ROOT / "zoo").iterdir() if path.is_dir()))
PAGES = {str(path.relative_to(ROOT)): path for folder in FOLDERS for path in sorted(folder.glob("*.md"))}
TEXTS = {name: path.read_text(encoding="utf-8") for name, path in PAGES.items()}


def blocks(text: str, kind: str) -> list[str]:
    return re.findall(rf"```{kind}\n(.*?)```", text, flags=re.DOTALL)


def prose(text: str) -> str:
    return re.sub(r"```.*?```", "", text, flags=re.DOTALL)


def anchors(text: str) -> set[str]:
    """What the headings of a page are called in links, as GitHub does it."""
    headings = re.findall(r"^#+ (.+)$", prose(text), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-") for heading in headings}


def commands(text: str) -> list[str]:
    """Lines of a page that begin with a command of ours, inside of lines too: behind ``&&``, before ``#``."""
    lines = [line for block in blocks(text, "bash") for line in block.replace("\\\n", " ").splitlines()]
    parts = [part.strip() for line in lines for part in re.split(r"&&|\||;", line.partition(" # ")[0])]
    return [part for part in parts if part.startswith("omnimoe ")]


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    lost = []
    for link in re.findall(r"\]\(([^)\s]+)\)", prose(TEXTS[page])):
        place, _, anchor = link.partition("#")
        if "://" in link or link.startswith("mailto:"):
            continue
        path = (PAGES[page].parent / place).resolve() if place else PAGES[page]
        if not path.exists() or (anchor and anchor not in anchors(path.read_text(encoding="utf-8"))):
            lost.append(link)
    assert lost == []


def test_every_page_is_one_link_from_the_readme():
    linked = set(re.findall(r"\]\(([^)#\s]+)", TEXTS["README.md"]))
    assert [page for page in PAGES if page.startswith("docs/") and page not in linked] == []


def test_the_readme_names_every_model():
    table = TEXTS["README.md"].partition("## The zoo")[2].partition("\n## ")[0]
    cells = [line.split(" | ")[0] for line in table.splitlines() if line.startswith("| `")]
    named = [name for cell in cells for name in re.findall(r"`([^`]+)`", cell) if not name.startswith("...")]
    ours = [name for name in list_models() if MODELS.get(name).__module__.startswith("omnimoe.zoo.")]
    assert [name for name in ours if not any(fnmatch.fnmatchcase(name, pattern) for pattern in named)] == []
    assert [pattern for pattern in named if not fnmatch.filter(ours, pattern)] == []


def test_the_code_of_the_readme_runs(tmp_path, monkeypatch):
    """All but that which loads published checkpoints."""
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    try:
        for block in blocks(TEXTS["README.md"], "python"):
            if "Bagel" not in block:
                exec(compile(block, "README.md", "exec"), names)  # noqa: S102 - our own page
    finally:
        if "round_robin" in ROUTERS:
            ROUTERS.remove("round_robin")
    assert names["out"].loss.isfinite()
    config = names["moma"].replace(num_layers=1, hidden_size=32)
    config = config.replace(experts=config.experts.replace(router=names["RoundRobinRouter"].Config()))
    assert names["load"]("dense_nano", experts=config.experts, num_layers=1)(names["input_ids"]).logits.isfinite().all()


@functools.cache
def options(command: str) -> set[str]:
    """All that a command and those below it take."""
    whole = _parser(only=command)
    (choices,) = (held.choices for held in whole._actions if isinstance(held, argparse._SubParsersAction))
    pending, found = [choices[command]], set()
    while pending:
        for action in pending.pop()._actions:
            found |= set(action.option_strings)
            if isinstance(action, argparse._SubParsersAction):
                pending += action.choices.values()
    return found


@pytest.mark.parametrize("page", [page for page in PAGES if commands(TEXTS[page])])
def test_commands_are_taken(page):
    for line in commands(TEXTS[page]):
        words = shlex.split(line)[1:]
        assert _parser(only=words[0]).parse_args(words).command == words[0], line


@pytest.mark.parametrize("page", PAGES)
def test_commands_in_the_text_are_known(page):
    for line in re.findall(r"`omnimoe ([^`]+)`", prose(TEXTS[page])):
        command, *words = line.split()
        assert command in COMMANDS, line
        flags = {word.strip("[]").partition("=")[0] for word in words if word.strip("[").startswith("--")}
        assert flags <= options(command), line


def taken(source: str) -> list[str]:
    """The names that a piece of code takes from omnimoe."""
    nodes = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.ImportFrom)]
    ours = [node for node in nodes if (node.module or "").partition(".")[0] == "omnimoe"]
    return [f"{node.module}.{alias.name}" for node in ours for alias in node.names]


@pytest.mark.parametrize("page", PAGES)
def test_names_are_there(page):
    """Of code that no other test runs too: it parses, and what it takes from omnimoe is there."""
    text = TEXTS[page]
    names = [name for block in blocks(text, "python") for name in taken(textwrap.dedent(block))]
    names += [name for line in re.findall(r"`(from omnimoe[^`]* import [^`]+)`", prose(text)) for name in taken(line)]
    names += re.findall(r"`(omnimoe(?:\.\w+)+)", prose(text))
    for name in dict.fromkeys(names):
        pkgutil.resolve_name(name)


@pytest.mark.parametrize("page", PAGES)
def test_files_that_are_named_are_there(page):
    named = re.findall(
        r"`(?:python |pytest )?((?:omnimoe|zoo|tests|docs|benchmarks|examples|csrc)/[^`]*)`", prose(TEXTS[page])
    )
    paths = [word.partition("::")[0] for words in named for word in words.split() if "/" in word]
    plain = [path for path in paths if not re.search(r"[*<>{}\[\]]", path)]
    assert [path for path in plain if not (ROOT / path).exists()] == []

"""The pages on upcycling and seeds: their code runs, their commands are taken, their links lead somewhere."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

import omnimoe
from omnimoe.cli import _parser
from omnimoe.hub import load

DOCS = Path(__file__).parents[2] / "docs"
PAGES = {name: (DOCS / name).read_text(encoding="utf-8") for name in ("upcycling.md", "seeds.md")}


def blocks(page: str, kind: str) -> list[str]:
    return re.findall(rf"```{kind}\n(.*?)```", PAGES[page], flags=re.DOTALL)


def test_the_code_on_upcycling_runs(capsys):
    names: dict = {}
    for block in blocks("upcycling.md", "python"):
        exec(compile(block, "docs/upcycling.md", "exec"), names)  # noqa: S102 - our own page
    assert "copied model.backbone.layers.*.self_attn.q_proj.weight" in capsys.readouterr().out
    assert names["told"].trained > 0


def test_the_code_on_seeds_that_grows_one_runs(monkeypatch):
    (block,) = [found for found in blocks("seeds.md", "python") if "upcycle" in found]
    seed = load("qwen3_0_6b", num_layers=1, hidden_size=64, seed=0)
    monkeypatch.setattr(omnimoe, "from_pretrained", lambda name: seed)
    names: dict = {}
    exec(compile(block, "docs/seeds.md", "exec"), names)  # noqa: S102 - our own page
    assert names["model"].config.modality_names == ("text", "image")


@pytest.mark.parametrize("page", PAGES)
def test_commands_are_taken(page):
    found = [line for block in blocks(page, "bash") for line in block.replace("\\\n", " ").splitlines()]
    for line in filter(lambda line: line.startswith("omnimoe "), found):
        words = shlex.split(line)[1:]
        assert _parser(only=words[0]).parse_args(words).command == words[0]
    assert found or page == "seeds.md"


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    links = [link.partition("#")[0] for link in re.findall(r"\]\(([^)]+)\)", PAGES[page])]
    missing = [link for link in links if link and not link.startswith("https://") and not (DOCS / link).exists()]
    assert links
    assert missing == []

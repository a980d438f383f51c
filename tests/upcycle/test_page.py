"""The pages on upcycling and seeds: their code runs."""

from __future__ import annotations

import re
from pathlib import Path

import omnimoe
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

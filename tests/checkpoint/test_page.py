"""The page on checkpoints does what it says, from top to bottom."""

from __future__ import annotations

import re
from pathlib import Path

PAGE = Path(__file__).parents[2] / "docs" / "checkpoints.md"


def test_its_code_runs(monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    for block in re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), flags=re.DOTALL):
        exec(compile(block, PAGE.name, "exec"), names)  # noqa: S102 - our own page
    assert "config.json declares 3 layers, the weights are of 2" in capsys.readouterr().out
    assert (tmp_path / "model" / "notes.json").read_text() == "{}"
    folder = {path.name for path in (tmp_path / "model").iterdir()} - {"notes.json"}
    table = set(re.findall(r"^\| `([\w.]+)` \|", PAGE.read_text(encoding="utf-8"), flags=re.MULTILINE))
    assert folder == table

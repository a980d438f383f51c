"""The page on other tools runs as it stands."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

PAGE = Path(__file__).parents[2] / "docs" / "tools.md"
SECTIONS = ["peft", "torchao", "lm_eval", "accelerate"]


def test_the_code_runs_from_top_to_bottom(monkeypatch, tmp_path, capsys):
    for name in SECTIONS:
        pytest.importorskip(name)
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), flags=re.DOTALL)
    assert len(blocks) == 7
    for block in blocks:
        exec(compile(block, str(PAGE), "exec"), names)  # noqa: S102 - our own page
    assert "torch.int8" in capsys.readouterr().out
    plain, int8 = (next((tmp_path / name).glob("*.safetensors")).stat().st_size for name in ("plain", "int8"))
    assert int8 < plain
    assert (tmp_path / "adapter" / "adapter_model.safetensors").is_file()

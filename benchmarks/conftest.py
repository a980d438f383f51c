"""``pytest benchmarks`` collects tests alone; the other files are commands, which import what they measure."""

from __future__ import annotations

from pathlib import Path

collect_ignore = [file.name for file in Path(__file__).parent.glob("*.py") if not file.name.startswith("test_")]

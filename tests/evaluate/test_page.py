"""The code of the page on evaluation runs from top to bottom."""

from __future__ import annotations

import re
from pathlib import Path

from omnimoe.evaluate import METRICS
from omnimoe.evaluate.base import BUILT_IN

PAGE = (Path(__file__).parents[2] / "docs" / "evaluation.md").read_text(encoding="utf-8")


def test_code_of_the_page():
    names: dict[str, object] = {}
    try:
        for block in re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL):
            exec(compile(block, "docs/evaluation.md", "exec"), names)  # noqa: S102 - our own page
    finally:
        if "name_length" in METRICS:
            METRICS.remove("name_length")
    assert names["found"].measures["name_length"][0].of == "mot"


def test_every_built_in_metric_has_a_section():
    assert [line[4:] for line in PAGE.splitlines() if line.startswith("### ")] == list(BUILT_IN)

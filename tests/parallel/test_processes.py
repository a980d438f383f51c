"""Models on two processes: split by heads and width, by experts, and by layer as FSDP2 does it."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.parallel.cases import CASES
from tests.parallel.ranks import run

pytestmark = [pytest.mark.slow, pytest.mark.ranks]

GROUPS: dict[str, list[str]] = {}
for _name in CASES:
    GROUPS.setdefault(_name.partition("/")[0], []).append(_name)


@pytest.fixture(scope="module")
def ended(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, list[str]]]:
    return {}


HAZARDS = {"expert_parallel_one_expert/moe_top_1": 18, "expert_parallel/moe_tied": 32}
"""Rows of tests/hazard_rows.py."""


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.hazard(HAZARDS[name]) if name in HAZARDS else ()) for name in CASES]
)
def test_two_processes(name: str, ended: dict, tmp_path_factory: pytest.TempPathFactory):
    group = name.partition("/")[0]
    if group not in ended:
        ended[group] = run(tmp_path_factory.mktemp(group), GROUPS[group])
    assert ended[group][name] == ["", ""], "\n".join(ended[group][name])


def test_a_case_that_fails_on_one_rank_is_told(tmp_path: Path):
    ended = run(tmp_path, ["no_such_case/dense"])
    assert all("KeyError" in text for text in ended["no_such_case/dense"])

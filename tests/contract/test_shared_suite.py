"""transformers' own tests of models, run against ours; and that the comparison with the expected skips can fail."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.contract import run, sdist, skips

ROOT = Path(__file__).parents[2]


def shared_suite(*arguments: str) -> subprocess.CompletedProcess:
    # the suite itself is fetched once for all runs, so not into the cache of this session
    environment = {name: value for name, value in os.environ.items() if name != "OMNIMOE_CACHE"}
    command = [sys.executable, "-m", "tests.contract.run", *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)


@pytest.mark.slow
@pytest.mark.timeout(2400)
@pytest.mark.parametrize("job", ["model", pytest.param("parallel", marks=pytest.mark.ranks)])
def test_the_shared_suite_passes_with_the_expected_skips(job):
    ended = shared_suite(job)
    # a machine without an index gives 2, which is no success either
    assert ended.returncode == 0, ended.stdout[-6000:] + ended.stderr[-2000:]


def outcome(kind: str, reason: str = "") -> dict[str, str]:
    return {"outcome": kind, "reason": reason}


def all_as_expected(job: str) -> dict[str, dict[str, str]]:
    groups = [group for group in skips.EXPECTED[job] if group.when()]
    names = [f"{kind}::{test}" for group in groups for kind in group.kinds for test in group.tests]
    assert len(names) == len(set(names)), "one test stands under two reasons"
    return {**dict.fromkeys(names, outcome("skipped", "as listed")), "MoeTest::test_save_load": outcome("passed")}


@pytest.mark.parametrize("job", ["model", "parallel"])
def test_what_is_as_expected_is_right(job):
    assert skips.compare(job, all_as_expected(job)) == []


@pytest.mark.parametrize(
    ("name", "held", "complaint"),
    [
        (
            "MoeTest::test_save_load",
            outcome("failed", "AssertionError"),
            "FAILED MoeTest::test_save_load: AssertionError",
        ),
        ("MoeTest::test_save_load", outcome("skipped", "new"), "UNEXPECTED SKIP MoeTest::test_save_load: new"),
        ("MoeTest::test_sliding_window_mask", outcome("passed"), "NOT SKIPPED MoeTest::test_sliding_window_mask"),
        ("MoeTest::test_sliding_window_mask", None, "GONE MoeTest::test_sliding_window_mask"),
        # skipped of a dense model, but not of one with experts
        ("MoeTest::test_output_router_logits_from_config", outcome("skipped", "no experts"), "UNEXPECTED SKIP"),
    ],
)
def test_any_difference_is_named(name, held, complaint):
    outcomes = all_as_expected("model")
    outcomes.pop(name, None)
    if held is not None:
        outcomes[name] = held
    assert [line.startswith(complaint) for line in skips.compare("model", outcomes)] == [True]


def test_a_selection_of_tests_is_compared_where_it_ran():
    assert skips.compare("model", {"MoeTest::test_save_load": outcome("passed")}, is_whole=False) == []
    assert skips.compare("model", {"MoeTest::test_sliding_window_mask": outcome("passed")}, is_whole=False) != []


def test_a_suite_that_cannot_be_fetched_is_not_run_and_never_green(cache_dir, monkeypatch, capsys):
    for name in sdist.NEEDED:
        pytest.importorskip(name)
    monkeypatch.setattr(sdist, "installed_version", lambda: "0.0.0.dev0")
    # no index to ask
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(cache_dir))
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    assert run.main(["model"]) == 2
    assert "NOT RUN: no source distribution of transformers 0.0.0.dev0" in capsys.readouterr().err
    assert not list((cache_dir / "transformers-suite").rglob("*.py")), "nothing half fetched stays"


def test_what_the_suite_needs_and_is_not_there_is_named(monkeypatch, capsys):
    monkeypatch.setattr(sdist, "NEEDED", ("no_such_package",))
    assert run.main(["parallel"]) == 2
    assert "NOT RUN: the packages no_such_package are missing; pip install -e '.[contract]'" in capsys.readouterr().err

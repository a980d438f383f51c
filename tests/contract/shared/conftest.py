"""Writes what became of every test to the file that ``OMNIMOE_SUITE_REPORT`` names."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

OUTCOMES: dict[str, dict[str, str]] = {}


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    name = report.nodeid.partition("::")[2]
    held = OUTCOMES.setdefault(name, {"outcome": "passed", "reason": ""})
    if report.failed:
        held.update(outcome="failed", reason=str(report.longrepr).splitlines()[-1])
    elif report.skipped and held["outcome"] == "passed":
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
        held.update(outcome="skipped", reason=reason.removeprefix("Skipped: "))


def pytest_sessionfinish(session: pytest.Session) -> None:
    if hasattr(session.config, "workerinput"):
        return
    Path(os.environ["OMNIMOE_SUITE_REPORT"]).write_text(json.dumps(OUTCOMES, indent=1), encoding="utf-8")

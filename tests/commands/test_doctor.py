"""The doctor tells what is used and why not more."""

from __future__ import annotations

import json
import os
import subprocess
import sys

from omnimoe import cli
from omnimoe.ops import missing_kernels


def test_it_tells_versions_kernels_and_choices(capsys):
    assert cli.main(["doctor"]) == 0
    told = capsys.readouterr().out
    assert "torch" in told
    assert "grouped_mm" in told
    assert cli.main(["doctor", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    routed = {row["dtype"]: row["backend"] for row in found["ops"] if row["op"] == "experts_mlp, routed"}
    assert set(routed) == {"float32", "bfloat16", "float16", "float64"}
    assert set(routed.values()) == ({"torch"} if missing_kernels() else {"cpp"})
    assert (found["cpu kernels"]["library"] is None) == bool(missing_kernels())


def test_it_says_why_kernels_are_missing(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "omnimoe.cli", "doctor"],
        env={**os.environ, "CXX": "no-such-compiler", "OMNIMOE_KERNELS": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "none: there is no C++ compiler (no-such-compiler)" in done.stdout
    assert "cpp: there is no C++ compiler" in done.stdout

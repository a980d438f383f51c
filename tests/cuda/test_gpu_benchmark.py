"""The one command for a GPU survives what fails, here: that there is none."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]

PARTS = """
import sys, time
sys.path.insert(0, ".")
from benchmarks import gpu

if __name__ == "__main__":
    from pathlib import Path
    session = gpu.Session(Path(sys.argv[1]), 10)
    shape = "grouped_mm", "moma_tiny", 64, "uniform", 1, ["reference"], "cpu"
    assert session.part("fails", gpu.tests, 0.01) is None
    assert session.part("hangs", gpu.timings, *shape, seconds=0.01) is None
    assert session.part("works", gpu.timings, *shape)["work"]["forward"]["omnimoe"]["seconds"] > 0
    session.end = 0
    session.part("is late", gpu.device)
    print(gpu.table(session.found))
"""


@pytest.mark.slow
def test_without_a_device_it_says_so(tmp_path):
    if torch.cuda.is_available():
        pytest.skip("here is one")
    command = [sys.executable, "benchmarks/gpu.py", "--out", str(tmp_path / "gpu.json")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    told = json.loads((tmp_path / "gpu.json").read_text())
    assert told["parts"]["device"]["status"] == "failed"


def test_a_part_that_fails_or_hangs_costs_that_part_alone(tmp_path):
    script = tmp_path / "parts.py"
    script.write_text(PARTS)
    command = [sys.executable, str(script), str(tmp_path / "gpu.json")]
    environment = {**os.environ, "OMNIMOE_BUILD": "0"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    parts = json.loads((tmp_path / "gpu.json").read_text())["parts"]
    assert {name: part["status"] for name, part in parts.items()} == {
        "fails": "failed", "hangs": "failed", "works": "done", "is late": "no time",
    }  # fmt: skip
    assert "| works, forward | dense" in done.stdout

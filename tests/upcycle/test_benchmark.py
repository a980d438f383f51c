"""The comparison at equal FLOPs runs from end to end and counts what it says."""

from __future__ import annotations

import json

import pytest

from benchmarks import upcycle_flops

QUICK = ["--num-layers", "1", "--seeds", "1", "--seed-steps", "2", "--steps", "2", "--batch-size", "1"]
QUICK += ["--sequence-length", "128", "--evaluate-batches", "1", "--evaluate-every", "2", "--precision", "fp32"]


@pytest.mark.slow
@pytest.mark.parametrize("way", ["experts", "moma"])
def test_it_runs(way, tmp_path, capsys):
    out = tmp_path / "result.json"
    upcycle_flops.main([*QUICK, "--way", way, "--out", str(out)])
    assert "held out" in capsys.readouterr().out
    (run,) = json.loads(out.read_text())["runs"]
    cost = run["flops"]["scratch"] / run["steps"]["scratch"]
    assert abs(run["flops"]["budget"] - run["flops"]["scratch"]) <= cost / 2
    curves = run["curves"]
    assert curves["upcycled"]["flops"][0] == curves["seed"]["flops"][-1]
    assert run["is_preserved"] == (way == "experts")
    if run["is_preserved"]:
        ends = curves["upcycled"]["held_out"]["all"][0], curves["seed"]["held_out"]["all"][-1]
        assert ends[0] == pytest.approx(ends[1], abs=1e-3)

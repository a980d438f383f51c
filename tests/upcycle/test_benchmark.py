"""The comparison at equal FLOPs runs from end to end and counts what it says."""

from __future__ import annotations

import json

import pytest

from benchmarks import upcycle_flops
from omnimoe.compare import claimed
from omnimoe.train import Training

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


def test_a_killed_benchmark_goes_on_and_a_finished_one_is_read(tmp_path, capsys, monkeypatch):
    out, runs = tmp_path / "result.json", tmp_path / "runs"
    arguments = [*QUICK, "--model", "dense_pico", "--way", "towers", "--out", str(out), "--runs", str(runs)]
    take, steps = Training._take_step, []

    def killed(self):
        steps.append(self.name)
        if steps.count("upcycled") == 2:
            raise RuntimeError("killed")
        return take(self)

    monkeypatch.setattr(Training, "_take_step", killed)
    with pytest.raises(RuntimeError, match="killed"):
        upcycle_flops.main(arguments)
    assert steps == ["seed", "seed", "upcycled", "upcycled"]
    assert not out.exists()
    monkeypatch.setattr(Training, "_take_step", lambda self: (steps.append(self.name), take(self))[1])
    upcycle_flops.main(arguments)
    assert steps[4:] == ["upcycled", "scratch", "scratch", "scratch", "scratch"], "at the step that was broken off"
    first = json.loads(out.read_text())
    assert not list(runs.glob("*/*/checkpoint*"))
    upcycle_flops.main(arguments)
    assert len(steps) == 9
    assert json.loads(out.read_text())["runs"] == first["runs"]
    (run,) = first["runs"]
    assert run["curves"]["upcycled"]["flops"][0] == run["curves"]["seed"]["flops"][-1]
    with pytest.raises(ValueError, match="was made with another lr; take another --runs"):
        upcycle_flops.main([*arguments, "--lr", "0.1"])
    with claimed(runs / "dense_pico-towers-seed0"):
        capsys.readouterr()
        upcycle_flops.main(arguments)
    assert "1 of 1 seeds are with another process" in capsys.readouterr().out

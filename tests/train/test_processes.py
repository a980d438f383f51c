"""Several processes make the same run as one; where one is lost the others end, and a restart goes on to the bit."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from omnimoe.config import ConfigError
from omnimoe.train.processes import Processes, joined
from tests.children import limited
from tests.train.runs import same_tensors, tiny

ROOT = Path(__file__).parents[2]
MEMORY = 8 << 30
"""Bytes of address space of each process, beyond what this one has: twice what it reserves."""
LENGTHS = ("--sequence-length", "128", "--warmup", "2", "--evaluate-batches", "1", "--evaluate-every", "0")
OPTIONS = ("--steps", "6", *LENGTHS, "--save-every", "2", "--log-every", "1", "--noise", "image=0.1")


def declared(folder: Path, kind: str) -> Path:
    path = folder / f"{kind}.json"
    tiny(kind).to_json_file(path)
    return path


def start(out: Path, model: Path, *options: str, launcher: tuple[str, ...] = (), **fate: object) -> subprocess.Popen:
    """The command of a run, under torchrun where a launcher is given; each of its processes may take so much memory."""
    pids = out.with_name(f"{out.name}-pids")
    pids.mkdir(exist_ok=True)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PIDS": str(pids)}
    if fate:
        environment["FATE"] = json.dumps(fate)
    begin = ("-m", "torch.distributed.run", "--standalone", *launcher, "-m") if launcher else ("-m",)
    command = [sys.executable, *begin, "tests.train.worker", "train", str(model), "--out", str(out)]
    with limited(MEMORY):
        return subprocess.Popen(
            [*command, *OPTIONS, *options], cwd=ROOT, env=environment, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip


def two(*more: str) -> tuple[str, ...]:
    return ("--nproc-per-node", "2", *more)


def finish(process: subprocess.Popen, *, within: float = 280.0) -> tuple[int, str]:
    told, _ = process.communicate(timeout=within)
    return process.returncode, told


def result(out: Path) -> dict:
    """Weights, state and log of a run, without what a clock says."""
    state = torch.load(out / "checkpoint" / "training_state.pt", weights_only=True)
    state["history"].pop("seconds")
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    log = [{name: value for name, value in line.items() if name != "tokens_per_second"} for line in lines]
    return {"weights": load_file(out / "checkpoint" / "model.safetensors"), "state": state, "log": log}


def alive(folder: Path) -> list[str]:
    """Processes of a run that are still there."""
    return [path.name for path in folder.iterdir() if (Path("/proc") / path.name).exists()]


def test_one_process_has_nothing_to_share(monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    with joined("cpu") as device:
        assert device == torch.device("cpu")
    alone, batch = Processes.current(), {"input_ids": torch.arange(4)}
    assert alone == Processes(rank=0, world_size=1)
    assert not alone.is_orphan
    assert alone.share(batch) is batch
    assert alone.gather(3) == [3]
    assert alone.sum(torch.ones(2)).tolist() == [1, 1]
    alone.check(7)


def test_rows_are_shared_out_in_order_and_evenly():
    batch = {"input_ids": torch.arange(12).view(6, 2), "labels": torch.arange(6)}
    parts = [Processes(rank=rank, world_size=3).share(batch) for rank in range(3)]
    assert [part["labels"].tolist() for part in parts] == [[0, 1], [2, 3], [4, 5]]
    assert torch.equal(torch.cat([part["input_ids"] for part in parts]), batch["input_ids"])
    with pytest.raises(
        ConfigError, match="batch_size 8 cannot be shared out among 3 processes; make it a multiple of 3"
    ):
        Processes(world_size=3).check(8)


def test_what_is_no_lost_process_is_raised_as_it_is():
    for told, world_size in (("gloo: closed", 1), ("shapes differ", 2)):
        with (
            pytest.raises(RuntimeError, match=told) as caught,
            Processes(world_size=world_size).held_together("at step 1"),
        ):
            raise RuntimeError(told)
        assert type(caught.value) is RuntimeError


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory) -> dict:
    folder = tmp_path_factory.mktemp("unbroken")
    code, told = finish(start(folder / "run", declared(folder, "expert_choice"), "--batch-size", "4", launcher=two()))
    assert code == 0, told
    assert told.count("checkpoint  ") == 1
    return result(folder / "run")


@pytest.mark.slow
@pytest.mark.ranks
def test_two_processes_are_one_with_as_many_forwards(tmp_path):
    """A process's rows are those of one of the forwards that a single process takes after each other."""
    model = declared(tmp_path, "top_k")
    options = ("--precision", "fp32", "--noise", "")
    runs = {
        "one": start(tmp_path / "one", model, "--batch-size", "2", "--accumulate", "4", *options),
        "two": start(tmp_path / "two", model, "--batch-size", "4", "--accumulate", "2", *options, launcher=two()),
    }
    for process in runs.values():
        code, told = finish(process)
        assert code == 0, told
    one, both = (result(tmp_path / name) for name in runs)
    for name, weight in one["weights"].items():
        torch.testing.assert_close(both["weights"][name], weight, atol=1e-5, rtol=1e-4)
    # held-out batches are as large as those of training, so theirs differ
    trained = [[list(line.values())[2:] for line in run["log"] if line["kind"] == "train"] for run in (one, both)]
    for mine, theirs in zip(*trained, strict=True):
        assert mine == pytest.approx(theirs, rel=1e-4)
    # a run of two processes may go on as one
    code, told = finish(start(tmp_path / "two", model, *options, "--resume"))
    assert code == 0, told


KILLS = {
    "the first, in a step": {"rank": 0, "step": 5, "during": "step"},
    "the second, in a step": {"rank": 1, "step": 5, "during": "step"},
    "the first, in a save": {"rank": 0, "step": 3, "during": "save"},
    "the second, in a save": {"rank": 1, "step": 3, "during": "save"},
}


@pytest.mark.slow
@pytest.mark.ranks
@pytest.mark.hazard(26)
@pytest.mark.parametrize("case", KILLS)
def test_a_run_that_torchrun_restarts_is_bitwise_the_unbroken_one(tmp_path, unbroken, case):
    model = declared(tmp_path, "expert_choice")
    launcher = two("--max-restarts", "1")
    process = start(tmp_path / "run", model, "--batch-size", "4", launcher=launcher, signal="SIGKILL", **KILLS[case])
    code, told = finish(process)
    assert code == 0, told
    assert len(list((tmp_path / "run-pids").iterdir())) == 4
    assert same_tensors(result(tmp_path / "run"), unbroken)


@pytest.mark.slow
@pytest.mark.ranks
@pytest.mark.hazard(26)
@pytest.mark.parametrize("during", ["step", "save"])
def test_a_killed_process_and_the_one_after_it_make_the_run_of_one(tmp_path, during):
    model = declared(tmp_path, "expert_choice")
    whole = start(tmp_path / "whole", model, "--batch-size", "2")
    step = 5 if during == "step" else 3
    killed = start(tmp_path / "run", model, "--batch-size", "2", rank=0, step=step, during=during, signal="SIGKILL")
    assert finish(whole)[0] == 0
    assert finish(killed)[0] == -signal.SIGKILL
    code, told = finish(start(tmp_path / "run", model, "--batch-size", "2", "--auto-resume"))
    assert code == 0, told
    assert same_tensors(result(tmp_path / "run"), result(tmp_path / "whole"))


@pytest.mark.slow
@pytest.mark.ranks
@pytest.mark.hazard(25)
@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("how", ["SIGKILL", "SIGSTOP"])
def test_a_lost_or_stuck_process_ends_all_of_them(tmp_path, how, rank):
    model = declared(tmp_path, "dense")
    begun = time.monotonic()
    process = start(
        tmp_path / "run", model, "--batch-size", "4", "--timeout", "20", launcher=two("--max-restarts", "0"),
        rank=rank, step=3, during="step", signal=how,
    )  # fmt: skip
    code, told = finish(process)
    assert code == 1, told
    # a process that stands still is waited for, told to end, and killed half a minute later
    assert time.monotonic() - begun < 250
    assert len(list((tmp_path / "run-pids").iterdir())) == 2
    assert alive(tmp_path / "run-pids") == []
    if how == "SIGSTOP":
        assert f"process {1 - rank} of 2 lost another at step 4" in told
    else:
        assert f"failed (exitcode: -9) local_rank: {rank}" in told
    state = torch.load(tmp_path / "run" / "checkpoint" / "training_state.pt", weights_only=True)
    assert state["step"] == 2


@pytest.mark.slow
@pytest.mark.ranks
@pytest.mark.hazard(25)
def test_processes_whose_launcher_is_killed_save_and_end(tmp_path):
    process = start(
        tmp_path / "run", declared(tmp_path, "dense"), "--batch-size", "4", "--steps", "100000", launcher=two()
    )
    log, limit = tmp_path / "run" / "log.jsonl", time.monotonic() + 200
    while not (log.exists() and '"kind": "train"' in log.read_text()):
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < limit
        time.sleep(0.1)
    process.kill()
    while alive(tmp_path / "run-pids"):
        assert time.monotonic() < limit
        time.sleep(0.1)
    assert f"stopped at step {result(tmp_path / 'run')['state']['step']} of 100000" in finish(process)[1]

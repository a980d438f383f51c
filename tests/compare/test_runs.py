"""Finished runs are read, broken ones are taken up to the bit, and two processes never train the same one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from omnimoe.compare import Run, RunError, claimed, train_run
from omnimoe.compare.runs import RUN_FILE
from omnimoe.data import Corpus
from omnimoe.model import MODELS
from omnimoe.train import Training
from tests.train.runs import settings, tiny

ROOT = Path(__file__).parents[2]
SHORT = settings(steps=4, evaluate_every=1, warmup=1, save_every=2)


@pytest.fixture(scope="module")
def corpus() -> Corpus:
    return Corpus.load("p")


@pytest.fixture
def name():
    MODELS.register("tiny_run")(lambda: tiny("expert_choice"))
    yield "tiny_run"
    MODELS.remove("tiny_run")


@pytest.fixture
def kept(name, corpus, tmp_path):
    return train_run(name, SHORT, corpus=corpus, folder=tmp_path, show_progress=False)


def no_training(*_, **__):
    pytest.fail("it was trained again")


def without_clock(run: Run) -> dict:
    plain = run.to_dict()
    return {**plain, "history": {key: held for key, held in plain["history"].items() if key != "seconds"}}


def test_a_finished_run_is_read_and_not_trained(kept, name, corpus, tmp_path, monkeypatch):
    monkeypatch.setattr(Training, "run", no_training)
    read = train_run(name, SHORT, corpus=corpus, folder=tmp_path, resume=True)
    assert read.to_dict() == json.loads(json.dumps(kept.to_dict())) | {"settings": kept.settings.to_dict()}
    assert read.history.causal.keys() == read.history.held_out.keys()
    assert not read.is_causal
    assert read.forward_flops > 0


def test_without_resume_it_is_trained_anew(kept, name, corpus, tmp_path, monkeypatch):
    monkeypatch.setattr(Training, "run", lambda self: (_ for _ in ()).throw(RuntimeError("trained")))
    with pytest.raises(RuntimeError, match="trained"):
        train_run(name, SHORT, corpus=corpus, folder=tmp_path)
    assert Run.load(tmp_path) is None, "what is being replaced does not pass for finished"


def test_a_broken_run_is_taken_up_to_the_bit(kept, name, corpus, tmp_path, monkeypatch):
    take = Training._take_step

    def stop_at_three(self):
        if self.step == 3:
            raise RuntimeError("killed")
        return take(self)

    broken = tmp_path / "broken"
    monkeypatch.setattr(Training, "_take_step", stop_at_three)
    with pytest.raises(RuntimeError, match="killed"):
        train_run(name, SHORT, corpus=corpus, folder=broken, resume=True, show_progress=False)
    assert Run.load(broken) is None
    steps = []
    monkeypatch.setattr(Training, "_take_step", lambda self: (steps.append(self.step), take(self))[1])
    again = train_run(name, SHORT, corpus=corpus, folder=broken, resume=True, show_progress=False)
    assert steps == [2, 3], "from the checkpoint of step 2"
    assert without_clock(again) == without_clock(kept)


def test_weights_may_go_and_the_run_stays(name, corpus, tmp_path):
    train_run(name, SHORT, corpus=corpus, folder=tmp_path, keep_weights=False, show_progress=False)
    assert not list(tmp_path.glob("checkpoint*"))
    assert Run.load(tmp_path).history.steps == [0, 1, 2, 3, 4]


def test_a_run_of_another_model_is_refused(kept, corpus, tmp_path):
    with pytest.raises(RunError, match="it is of tiny_run, not of dense_nano; take another folder"):
        train_run("dense_nano", SHORT, corpus=corpus, folder=tmp_path, resume=True)


def test_a_config_that_gained_a_field_is_the_same(kept, name, corpus, tmp_path, monkeypatch):
    plain = json.loads((tmp_path / RUN_FILE).read_text())
    del plain["config"]["aligned_size"], plain["settings"]["keep"]
    (tmp_path / RUN_FILE).write_text(json.dumps(plain))
    monkeypatch.setattr(Training, "run", no_training)
    assert train_run(name, SHORT, corpus=corpus, folder=tmp_path, resume=True).history.steps == kept.history.steps


@pytest.mark.parametrize("text", ["", "{", "[]", '{"model": "tiny_run"}'])
def test_a_damaged_file_is_refused_by_its_path(tmp_path, text):
    (tmp_path / RUN_FILE).write_text(text)
    with pytest.raises(RunError, match=f"{RUN_FILE} is no finished run .* remove"):
        Run.load(tmp_path)


HOLDER = """
import sys, time
sys.path.insert(0, {root!r})
import fcntl, pathlib
folder = pathlib.Path({folder!r})
handle = open(folder / "lock", "w")
fcntl.flock(handle, fcntl.LOCK_EX)
print("held", flush=True)
time.sleep(60)
"""


def test_a_run_that_another_process_trains_is_left_to_it_until_it_dies(tmp_path):
    pytest.importorskip("fcntl")
    with claimed(tmp_path) as is_held:
        assert is_held
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER.format(root=str(ROOT), folder=str(tmp_path))], stdout=subprocess.PIPE, text=True
    )
    try:
        assert holder.stdout.readline() == "held\n"
        with claimed(tmp_path) as is_held:
            assert not is_held
        os.kill(holder.pid, 9)
        started = time.monotonic()
        with claimed(tmp_path, wait=True) as is_held:
            assert is_held
        assert time.monotonic() - started < 30
    finally:
        holder.kill()
        holder.wait()
        holder.stdout.close()


def test_a_lock_ends_with_an_error(tmp_path):
    with pytest.raises(RuntimeError), claimed(tmp_path):
        raise RuntimeError
    with claimed(tmp_path) as is_held:
        assert is_held

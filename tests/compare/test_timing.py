"""Steps are timed in turns, and as many as were asked for."""

from __future__ import annotations

import statistics

from omnimoe.compare import seconds_per_step
from omnimoe.data import Corpus
from omnimoe.train import Training
from tests.train.runs import settings


def test_rounds_take_turns(monkeypatch):
    order = []

    def run(self, *, until):
        order.append(self.model)
        self.history.seconds += 1.0 if self.model is order[0] else 3.0
        return self.history

    monkeypatch.setattr(Training, "run", run)
    found = seconds_per_step("mot_pico", "dense_pico", settings(steps=2), corpus=Corpus.load("p"), rounds=4)
    timed = order[2:]
    assert timed == timed[:2] * 4, "one step of each, in turns"
    assert found["ratios"] == [3.0] * 4
    assert (found["model"], found["base"], found["ratio"]) == ("mot_pico", "dense_pico", 3.0)
    assert (found["base_seconds"], found["seconds"]) == (1.0, 3.0)


def test_a_step_takes_time():
    found = seconds_per_step("mot_pico", "dense_pico", settings(), corpus=Corpus.load("p"), rounds=2)
    assert found["ratio"] == statistics.median(found["ratios"]) > 0
    assert min(found["seconds"], found["base_seconds"]) > 0

"""The record of a run: a JSON line an event, the same numbers for TensorBoard."""

from __future__ import annotations

import json

import pytest

from omnimoe.train.log import RunLog
from tests.train.runs import training


def lines(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def scalars(folder) -> dict[str, list[tuple[int, float]]]:
    event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    events = event_accumulator.EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    return {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def test_both_records_hold_what_the_history_holds(corpus, tmp_path):
    run = training(corpus, out=tmp_path)
    history = run.run()
    entries = lines(tmp_path)
    held_out = [entry for entry in entries if entry["kind"] == "held_out"]
    trained = [entry for entry in entries if entry["kind"] == "train"]
    assert [entry["step"] for entry in held_out] == history.steps == [0, 2, 4, 6]
    assert [entry["step"] for entry in trained] == history.train_steps == [2, 4, 6]
    for name, losses in history.held_out.items():
        assert [entry[name] for entry in held_out] == losses
    for name, losses in history.train.items():
        assert [entry[name] for entry in trained] == losses
    assert {"loss", "learning_rate", "gradient_norm", "tokens_per_second"} < set(trained[0])
    board = scalars(tmp_path)
    for name, losses in history.held_out.items():
        assert [step for step, _ in board[f"held_out/{name}"]] == history.steps
        assert [value for _, value in board[f"held_out/{name}"]] == pytest.approx(losses, rel=1e-6)
    assert board["train/learning_rate"] == [
        (entry["step"], pytest.approx(entry["learning_rate"], rel=1e-6)) for entry in trained
    ]


def test_taking_up_a_run_drops_what_came_after_its_checkpoint(tmp_path):
    log = RunLog(tmp_path)
    for step in range(5):
        log.write(step, "train", {"loss": 10.0 + step, "note": "words are for the file alone"})
    log.close()
    with (tmp_path / "log.jsonl").open("a") as file:
        file.write('{"step": 5, "ki')  # a killed process leaves its last line torn
    log = RunLog(tmp_path, resume_from=2)
    log.write(3, "train", {"loss": 30.0})
    log.close()
    assert [(entry["step"], entry["loss"]) for entry in lines(tmp_path)] == [(0, 10), (1, 11), (2, 12), (3, 30)]
    assert scalars(tmp_path)["train/loss"] == [(0, 10), (1, 11), (2, 12), (3, 30)]


def test_a_new_run_starts_a_new_record(tmp_path):
    for loss in (1.0, 2.0):
        log = RunLog(tmp_path)
        log.write(1, "train", {"loss": loss})
        log.close()
    assert [entry["loss"] for entry in lines(tmp_path)] == [2.0]
    assert scalars(tmp_path)["train/loss"] == [(1, 2.0)]


def test_without_a_folder_nothing_is_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    log = RunLog(None)
    log.write(1, "train", {"loss": 1.0})
    log.close()
    assert list(tmp_path.iterdir()) == []


def test_what_routers_do_is_logged_and_drawn_where_that_is_asked_for(corpus, tmp_path):
    event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    pytest.importorskip("matplotlib")
    run = training(corpus, "top_k", out=tmp_path, steps=2, evaluate_every=1, log_routing=True)
    run.run()
    entries = [entry for entry in lines(tmp_path) if entry["kind"] == "routing"]
    assert [entry["step"] for entry in entries] == [0, 1, 2]
    assert all(0 <= entry["balance"] <= 1 and entry["experts_per_token"] == 2 for entry in entries)
    events = event_accumulator.EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [event.step for event in events.Images("routing/load")] == [0, 1, 2]
    assert events.Images("routing/load")[0].encoded_image_string.startswith(b"\x89PNG")
    assert not run.model.model._forward_hooks

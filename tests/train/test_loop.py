"""The loop: it learns, it can be broken anywhere and taken up to the bit, and it stops where numbers are no numbers."""

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

from omnimoe.cli import main
from omnimoe.model import MODELS
from omnimoe.train import Training, TrainingError, evaluate
from tests.train.runs import build, measured, same_tensors, settings, tiny, training

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("kind", ["mot", "expert_choice"])
def test_thirty_steps_lower_the_loss_of_every_modality(corpus, kind):
    run = training(corpus, kind, steps=30, batch_size=4, learning_rate=1e-2, evaluate_every=0)
    history = run.run()
    assert history.steps == [0, 30]
    assert history.tokens == 30 * 4 * 128
    assert history.held_out["all"][1] < history.held_out["all"][0] - 1
    for name, (before, after) in history.held_out.items():
        assert after < before - 0.3, name


def test_packed_batches_reach_the_model_as_they_are(corpus):
    run, seen = training(corpus, steps=2, evaluate_batches=0), []
    run.model.register_forward_pre_hook(lambda _module, _args, kwargs: seen.append(kwargs), with_kwargs=True)
    run.run()
    expected = training(corpus, steps=2).batches
    assert len(seen) == 2
    assert all(same_tensors(given, next(expected)) for given in seen)


RUNS = {
    "dense": {"kind": "dense"},
    "towers, accumulated": {"kind": "mot", "accumulate": 2},
    "token choice, bf16": {"kind": "top_k", "precision": "bf16"},
    "expert choice": {"kind": "expert_choice"},
    "expert choice, accumulated, bf16": {"kind": "expert_choice", "accumulate": 2, "precision": "bf16"},
}


@pytest.mark.parametrize("name", RUNS)
def test_a_resumed_run_is_bitwise_the_unbroken_one(corpus, tmp_path, name):
    unbroken = training(corpus, **RUNS[name])
    unbroken.run()
    training(corpus, **RUNS[name], out=tmp_path).run(until=3)  # between two lines of the log
    resumed = training(corpus, **RUNS[name], out=tmp_path, seed=1)
    resumed.resume()
    assert resumed.step == 3
    resumed.run()
    assert same_tensors(dict(resumed.model.state_dict()), dict(unbroken.model.state_dict()))
    assert same_tensors(resumed.optimizer.state_dict(), unbroken.optimizer.state_dict())
    assert measured(resumed) == measured(unbroken)
    assert resumed.batches.state_dict() == unbroken.batches.state_dict()


def test_a_part_that_draws_in_its_forward_is_repeated_and_resumed_to_the_bit(corpus, tmp_path):
    def noisy(out: Path | None = None, *, elsewhere: int) -> Training:
        run = training(corpus, "top_k", out=out)
        run.model.model.embed_tokens.register_forward_hook(lambda _module, _args, x: x + 0.1 * torch.randn_like(x))
        torch.manual_seed(elsewhere)
        return run

    runs = [noisy(elsewhere=1), noisy(elsewhere=2)]
    for run in runs:
        run.run()
    noisy(tmp_path, elsewhere=3).run(until=3)
    resumed = noisy(tmp_path, elsewhere=4)
    resumed.resume()
    resumed.run()
    for other in (runs[1], resumed):
        assert same_tensors(dict(runs[0].model.state_dict()), dict(other.model.state_dict()))


def test_the_cut_offs_of_expert_choice_move_and_are_resumed(corpus, tmp_path):
    run = training(corpus, "expert_choice", out=tmp_path, steps=2)
    before = {name: value.clone() for name, value in run.model.named_buffers() if "cutoff" in name}
    run.run()
    after = dict(run.model.named_buffers())
    assert len(before) == 6
    assert not any(torch.equal(value, after[name]) for name, value in before.items())
    again = training(corpus, "expert_choice", out=tmp_path, steps=2, seed=1)
    again.resume()
    assert all(torch.equal(dict(again.model.named_buffers())[name], after[name]) for name in before)


def test_checkpoints_on_the_way_leave_the_run_as_it_is(corpus, tmp_path):
    plain, saving = training(corpus, "mot"), training(corpus, "mot", out=tmp_path, save_every=2)
    steps = []
    plain.run()
    saving.run(on_step=lambda run: steps.append((run.step, (tmp_path / "checkpoint").exists())))
    assert steps == [(1, False), (2, True), (3, True), (4, True), (5, True), (6, True)]
    assert same_tensors(dict(plain.model.state_dict()), dict(saving.model.state_dict()))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_or_a_schedulers_signal_ends_the_step_saves_and_returns(corpus, tmp_path, number):
    before = signal.getsignal(number)
    run = training(corpus, out=tmp_path)
    run.run(on_step=lambda held: held.step == 3 and signal.raise_signal(number))
    assert run.was_interrupted
    assert run.step == 3
    assert signal.getsignal(number) is before
    resumed, unbroken = training(corpus, out=tmp_path), training(corpus)
    resumed.resume()
    resumed.run()
    unbroken.run()
    assert not resumed.was_interrupted
    assert same_tensors(dict(resumed.model.state_dict()), dict(unbroken.model.state_dict()))


def test_ctrl_c_before_the_first_step_does_not_count_its_evaluation_twice(corpus, tmp_path, monkeypatch):
    run = training(corpus, out=tmp_path)
    monkeypatch.setattr(
        run, "_evaluate", lambda log: (type(run)._evaluate(run, log), run.__dict__.update(_stop_requested=True))
    )
    run.run()
    assert (run.step, run.history.steps) == (0, [0])
    resumed = training(corpus, out=tmp_path)
    resumed.resume()
    assert resumed.run().steps == [0, 2, 4, 6]
    kinds = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [entry["step"] for entry in kinds if entry["kind"] == "held_out"] == [0, 2, 4, 6]


def test_a_second_ctrl_c_breaks_off_at_once_and_keeps_the_last_checkpoint(corpus, tmp_path):
    def twice(run: Training) -> None:
        if run.step == 3:
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)

    run = training(corpus, out=tmp_path, save_every=2)
    outside = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell has a job in the background ignore it
    try:
        with pytest.raises(KeyboardInterrupt):
            run.run(on_step=twice)
    finally:
        signal.signal(signal.SIGINT, outside)
    again = training(corpus, out=tmp_path, save_every=2)
    again.resume()
    assert again.step == 2


def test_ctrl_c_at_the_command_line_and_resume_end_at_the_same_weights(tmp_path, capsys):
    declared = tmp_path / "tiny_interrupted.json"
    tiny("expert_choice").to_json_file(declared)

    def command(out: str, *more: str) -> list[str]:
        return [
            *("train", str(declared), "--out", str(tmp_path / out), "--steps", "60", "--batch-size", "2"),
            *(
                "--sequence-length",
                "128",
                "--evaluate-every",
                "0",
                "--evaluate-batches",
                "1",
                "--log-every",
                "1",
                *more,
            ),
        ]

    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    process = subprocess.Popen(
        [sys.executable, "-m", "omnimoe", *command("broken")],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    log, limit = tmp_path / "broken" / "log.jsonl", time.monotonic() + 120
    while process.poll() is None and time.monotonic() < limit:
        if log.exists() and '"kind": "train"' in log.read_text():
            process.send_signal(signal.SIGINT)
            break
        time.sleep(0.01)
    told, complaint = process.communicate(timeout=120)
    assert process.returncode == 130, complaint
    assert "--resume goes on" in told
    assert "Traceback" not in complaint
    state = torch.load(tmp_path / "broken" / "checkpoint" / "training_state.pt", weights_only=True)
    assert 1 <= state["step"] < 60

    for arguments in (command("broken", "--resume"), command("whole")):
        assert main(arguments) == 0
        MODELS.remove("tiny_interrupted")
    weights = [load_file(tmp_path / out / "checkpoint" / "model.safetensors") for out in ("broken", "whole")]
    assert same_tensors(*weights)


def test_the_same_line_starts_a_run_and_goes_on_with_it(tmp_path, capsys):
    declared = tmp_path / "tiny_again.json"
    tiny().to_json_file(declared)
    line = ["train", str(declared), "--out", str(tmp_path / "run"), "--auto-resume", "--evaluate-batches", "0"]
    sizes = ["--batch-size", "2", "--sequence-length", "128", "--steps", "2"]
    for steps in (2, 2):
        assert main([*line, *sizes]) == 0
        MODELS.remove("tiny_again")
        state = torch.load(tmp_path / "run" / "checkpoint" / "training_state.pt", weights_only=True)
        assert state["step"] == steps
    assert main([name for name in line if name != "--auto-resume"] + sizes) == 2
    assert "holds a checkpoint already; pass --resume to go on" in capsys.readouterr().err


def test_a_loss_that_is_no_number_stops_before_the_weights_move(corpus, tmp_path):
    run = training(corpus, out=tmp_path, accumulate=2, evaluate_batches=0)
    run.run(until=1)
    place = run.model.config.token_ranges["image"].start
    with torch.no_grad():
        run.model.lm_head.weight[place:].fill_(float("nan"))
    before = {name: value.clone() for name, value in run.model.state_dict().items()}
    with pytest.raises(
        TrainingError, match=r"the loss is nan at step 2 \(image, speech, text\); lower the learning rate"
    ):
        run.run()
    assert all(
        torch.equal(value.nan_to_num(), before[name].nan_to_num()) for name, value in run.model.state_dict().items()
    )
    again = training(corpus, out=tmp_path, accumulate=2, evaluate_batches=0)
    again.resume()
    assert again.step == 1
    assert all(value.isfinite().all() for value in again.model.state_dict().values())


def test_a_gradient_that_is_no_number_stops_before_the_weights_move(corpus):
    run = training(corpus, evaluate_batches=0)
    before = {name: value.clone() for name, value in run.model.state_dict().items()}
    run.model.model.norm.weight.register_hook(lambda gradient: gradient * float("inf"))
    with pytest.raises(TrainingError, match="norm of the gradient is (inf|nan) at step 1"):
        run.run()
    assert same_tensors(dict(run.model.state_dict()), before)


@pytest.mark.parametrize("kind", ["mot", "top_k", "expert_choice"])
def test_recomputing_activations_changes_nothing(corpus, kind):
    kept, recomputed = training(corpus, kind), training(corpus, kind, checkpoint_activations=True)
    kept.run()
    recomputed.run()
    assert recomputed.model.model.gradient_checkpointing
    assert measured(kept) == measured(recomputed)
    assert same_tensors(dict(kept.model.state_dict()), dict(recomputed.model.state_dict()))


def test_accumulated_forwards_weigh_the_same_and_make_one_larger_batch(corpus, tmp_path):
    options = {"steps": 4, "clip": 0.0, "log_every": 1, "evaluate_every": 0}
    large = training(corpus, "mot", out=tmp_path / "large", batch_size=4, **options)
    small = training(corpus, "mot", out=tmp_path / "small", batch_size=1, accumulate=4, **options)
    assert large.settings.tokens_per_step == small.settings.tokens_per_step
    large.run()
    small.run()
    assert large.batches.state_dict()["cursor"] == small.batches.state_dict()["cursor"]
    for name, losses in large.history.train.items():
        # before the first update both see the same tokens with the same weights
        assert small.history.train[name][0] == pytest.approx(losses[0], rel=1e-5)
    # sequences hold slightly different numbers of predicted tokens, which one large batch weighs and forwards do not
    ends = [evaluate(run.model, large.held_out)["all"] for run in (large, small)]
    assert ends[1] == pytest.approx(ends[0], rel=5e-3)
    first = [json.loads((tmp_path / out / "log.jsonl").read_text().splitlines()[1]) for out in ("large", "small")]
    assert first[1]["gradient_norm"] == pytest.approx(first[0]["gradient_norm"], rel=2e-2)


def test_accumulated_gradients_are_the_mean_over_forwards(corpus):
    run = training(corpus, "top_k", steps=1, accumulate=3, clip=0.0, evaluate_batches=0)
    gradients = {}
    run.optimizer.register_step_pre_hook(
        lambda *_: gradients.update({name: held.grad.clone() for name, held in run.model.named_parameters()})
    )
    twin, batches = build(tiny("top_k")), training(corpus).batches
    run.run()
    for _ in range(3):
        (twin(**next(batches)).loss / 3).backward()
    for name, parameter in twin.named_parameters():
        torch.testing.assert_close(gradients[name], parameter.grad)


def test_clipping_bounds_the_gradient_that_is_applied(corpus):
    run, norms = training(corpus, steps=2, clip=1e-3, evaluate_batches=0), []
    run.optimizer.register_step_pre_hook(
        lambda *_: norms.append(float(torch.stack([held.grad.norm() for held in run.model.parameters()]).norm()))
    )
    run.run()
    assert norms == pytest.approx([1e-3, 1e-3], rel=1e-2)


def test_a_run_without_a_folder_writes_nothing(corpus, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = training(corpus, steps=1)
    run.run()
    assert run.checkpoint_folder is None
    assert list(tmp_path.iterdir()) == []


def test_the_settings_of_a_run_lie_beside_its_model(corpus, tmp_path):
    training(corpus, out=tmp_path, steps=1, save_every=1).run()
    assert (
        json.loads((tmp_path / "checkpoint" / "training.json").read_text()) == settings(steps=1, save_every=1).to_dict()
    )


@pytest.mark.gpu
def test_a_resumed_run_on_cuda_has_the_step_weights_and_history_of_its_checkpoint(corpus, tmp_path):
    def make(seed: int, out: Path | None) -> Training:
        model = build(tiny("top_k"), seed).cuda()
        return Training(model, settings(precision="bf16"), corpus=corpus, out=out, show_progress=False)

    unbroken, broken, resumed = make(0, None), make(0, tmp_path), make(1, tmp_path)
    unbroken.run()
    broken.run(until=3)
    resumed.resume()
    assert same_tensors(dict(resumed.model.state_dict()), dict(broken.model.state_dict()))
    resumed.run()
    # sums on a GPU may come in another order
    assert resumed.history.held_out["all"] == pytest.approx(unbroken.history.held_out["all"], rel=1e-2)

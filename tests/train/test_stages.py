"""The stage that trains auxiliary routers alone: in a run, resumed, and from the command line."""

from __future__ import annotations

import json

import pytest
import torch

import omnimoe
from omnimoe.backbone import LayerRange
from omnimoe.cli import main
from omnimoe.config import ConfigError
from omnimoe.hub import from_pretrained
from omnimoe.model import OmniMoeForCausalLM
from omnimoe.routers import DepthRouter
from omnimoe.train import ResumeError, Training, load_settings
from tests.train.runs import build, same_tensors, settings, tiny

QUICK = [
    "--batch-size",
    "2",
    "--sequence-length",
    "128",
    "--evaluate-batches",
    "1",
    "--warmup",
    "2",
    "--log-every",
    "1",
]


def first_stage() -> OmniMoeForCausalLM:
    """Experts that choose with noise, and every second layer by depth."""
    config = tiny("expert_choice")
    router = config.experts.router
    noisy = router.replace(router=router.router.replace(gumbel_noise=1.0))
    depth = LayerRange(step=2, depth=DepthRouter.Config(pool="batch"))
    return build(config.replace(experts=config.experts.replace(router=noisy), layers=(depth,)))


@pytest.fixture(scope="module")
def seed_run(corpus, tmp_path_factory):
    out = tmp_path_factory.mktemp("seed")
    Training(first_stage(), settings(steps=4), corpus=corpus, out=out, show_progress=False).run()
    return out


def second(seed_run, corpus, out=None, **changes) -> Training:
    model = omnimoe.add_auxiliary_routers(from_pretrained(seed_run / "checkpoint"))
    asked = settings(**{"stage": "auxiliary", "learning_rate": 1e-2, **changes})
    return Training(model, asked, corpus=corpus, out=out, show_progress=False)


def test_it_trains_auxiliary_routers_alone_and_evaluates_by_them(seed_run, corpus, tmp_path):
    before = from_pretrained(seed_run / "checkpoint").state_dict()
    run = second(seed_run, corpus, tmp_path, steps=20, evaluate_every=20)
    start = {name: held.clone() for name, held in run.model.state_dict().items()}
    history = run.run()
    own = run.model.state_dict()
    assert {name for name in own if not torch.equal(own[name], start[name])} == {*own} - {*before}
    assert all(torch.equal(own[name], held) for name, held in before.items())
    assert history.held_out["all"][0] == history.held_out["all"][1], "by the choice of the batch nothing changed"
    assert history.causal["all"][0] != history.causal["all"][1]
    told = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    first, last = (entry for entry in told if entry["kind"] == "auxiliary")
    assert first["taken"] == first["recall"] == 0
    assert last["taken"] == pytest.approx(last["wanted"], rel=0.3), "thresholds were set with the last step"
    assert last["accuracy"] > first["accuracy"]
    made = from_pretrained(tmp_path / "checkpoint")
    assert made.generate(torch.tensor([[1, 20, 30]]), max_new_tokens=3, min_new_tokens=3).shape == (1, 6)


def biases_of(run: Training) -> dict[str, torch.Tensor]:
    return {name: held for name, held in run.model.state_dict().items() if name.endswith(".auxiliary.outer.bias")}


def test_thresholds_are_left_at_one_half_where_that_is_asked_for_with_a_bias_or_as_moma_has_it(seed_run, corpus):
    runs = []
    for threshold in ("set", "half", "half_unbiased"):
        torch.manual_seed(0)
        runs.append(second(seed_run, corpus, steps=3, evaluate_batches=0, auxiliary_threshold=threshold))
        runs[-1].run()
    left, half, none = map(biases_of, runs)
    assert left.keys() == half.keys() == none.keys()
    assert len(left) == 2 * 3 + 1, "a group of each layer, and depth"
    steps = 3 * 1e-2 * 1.01  # no bias is trained further than that, while setting it moves it to where tokens lie
    assert all(0 < held.abs().max() < steps for held in half.values())
    assert any(not torch.equal(left[name], half[name]) for name in left)
    assert not any(held.any() for held in none.values())
    states = [run.model.state_dict() for run in runs]
    weights = [name for name in states[0] if ".auxiliary." in name and name.endswith("weight")]
    assert all(torch.equal(states[0][name], states[1][name]) for name in weights)
    assert all(states[2][name].any() for name in weights)


def test_a_bias_that_was_trained_before_is_taken_away(seed_run, corpus):
    model = omnimoe.add_auxiliary_routers(from_pretrained(seed_run / "checkpoint"))
    for name, held in model.named_parameters():
        if name.endswith(".auxiliary.outer.bias"):
            held.data.fill_(0.5)
    asked = settings(stage="auxiliary", auxiliary_threshold="half_unbiased")
    run = Training(model, asked, corpus=corpus, show_progress=False)
    assert not any(held.any() for held in biases_of(run).values())


def test_what_is_foretold_is_the_choice_without_noise(seed_run, corpus):
    run, modes = second(seed_run, corpus, steps=1, evaluate_batches=0), set()
    run.model.register_forward_pre_hook(lambda module, given: modes.add(module.training))
    run.run()
    assert modes == {False}


def test_it_is_resumed_bitwise_and_not_as_another_stage(seed_run, corpus, tmp_path):
    unbroken = second(seed_run, corpus)
    unbroken.run()
    second(seed_run, corpus, tmp_path).run(until=3)
    resumed = second(seed_run, corpus, tmp_path)
    resumed.resume()
    resumed.run()
    assert same_tensors(resumed.model.state_dict(), unbroken.model.state_dict())
    assert resumed.history.causal == unbroken.history.causal
    other = Training(resumed.model, settings(learning_rate=1e-2), corpus=corpus, out=tmp_path, show_progress=False)
    with pytest.raises(ResumeError, match="stage was 'auxiliary' and is 'whole'"):
        other.resume()


def test_a_model_without_auxiliary_routers_and_a_freeze_beside_it_are_refused(corpus):
    with pytest.raises(ConfigError, match="add_auxiliary_routers"):
        Training(first_stage(), settings(stage="auxiliary"), corpus=corpus)
    with pytest.raises(ConfigError, match="freezes all else by itself"):
        settings(stage="auxiliary", freeze="text")
    with pytest.raises(ConfigError, match="unknown stage 'second'; known: whole, auxiliary"):
        settings(stage="second")
    with pytest.raises(ConfigError, match="unknown auxiliary_threshold 'third'; known: set, half, half_unbiased"):
        settings(stage="auxiliary", auxiliary_threshold="third")
    with pytest.raises(ConfigError, match="auxiliary_threshold 'half' is of stage 'auxiliary', got stage 'whole'"):
        settings(auxiliary_threshold="half")


def test_at_the_command_line(seed_run, corpus, tmp_path, capsys):
    run, more = tmp_path / "run", tmp_path / "more"
    asked = ["--from", "text", "a cat", "--to", "text", "--max-new-tokens", "2"]
    assert main(["generate", "--model", str(seed_run / "checkpoint"), *asked]) != 0
    assert "--stage auxiliary" in capsys.readouterr().err
    called = ["train", "--from", str(seed_run), "--stage", "auxiliary", "--out", str(run), *QUICK]
    called += ["--auxiliary-threshold", "half"]
    assert main([*called, "--steps", "2"]) == 0
    told = capsys.readouterr().out
    assert "auxiliary routers, which alone are trained" in told
    assert "every token routed by itself" in told
    assert load_settings(run / "checkpoint").stage == "auxiliary"
    assert load_settings(run / "checkpoint").auxiliary_threshold == "half"
    before, after = (from_pretrained(folder / "checkpoint").state_dict() for folder in (seed_run, run))
    assert all(torch.equal(after[name], held) for name, held in before.items())
    assert any(after[name].any() for name in after if ".auxiliary.outer" in name)
    assert main([*called, "--steps", "2", "--resume"]) == 0
    # training goes on whole from there, unless it is asked not to
    assert main(["train", "--from", str(run), "--out", str(more), *QUICK, "--steps", "1"]) == 0
    assert load_settings(more / "checkpoint").stage == "whole"
    assert load_settings(more / "checkpoint").auxiliary_threshold == "set"
    assert main(["train", "dense_nano", "--stage", "auxiliary", "--out", str(tmp_path / "none")]) != 0
    assert "name it with --from RUN" in capsys.readouterr().err

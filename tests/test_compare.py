"""The measure finds known factors, and a comparison treats its models alike."""

from __future__ import annotations

import io
import json
import logging
import math

import numpy as np
import pytest
import torch

from omnimoe.compare import ALL, Comparison, compare, resolve_names, step_match
from omnimoe.config import ConfigError
from omnimoe.data import Corpus
from omnimoe.experts import Experts, RoutedExperts, register_experts
from omnimoe.experts.base import EXPERTS
from omnimoe.model import MODELS
from omnimoe.registry import RegistryError
from omnimoe.routers import ByModalityRouter
from omnimoe.train import History, TrainSettings
from tests.train.runs import settings, tiny

STEPS = np.arange(25, 1001, 25)


def falling(steps: np.ndarray, *, speed: float = 1.0) -> np.ndarray:
    """A loss that falls by a power of the steps; at ``speed`` 2 it falls in half the steps."""
    return 1.5 + 20 * (steps * speed) ** -0.45


@pytest.mark.parametrize("factor", [0.2, 0.35, 0.5, 0.666, 0.9, 1.0, 1.2, 1.5])
def test_a_known_factor_is_found(factor):
    assert step_match(STEPS, falling(STEPS), STEPS, falling(STEPS, speed=1 / factor)) == pytest.approx(factor, rel=5e-3)


@pytest.mark.parametrize("factor", [0.3, 0.6, 1.0, 1.3])
def test_a_known_factor_is_found_through_noise(factor):
    found = []
    for seed in range(20):
        noise = np.random.default_rng(seed).normal(0, 0.01, (2, len(STEPS)))
        found.append(step_match(STEPS, falling(STEPS) + noise[0], STEPS, falling(STEPS, speed=1 / factor) + noise[1]))
    assert np.mean(found) == pytest.approx(factor, rel=0.03)
    assert np.std(found) < 0.05 * factor


def test_unequal_grids_of_evaluations():
    other = np.array([10, 40, 70, 150, 220, 400, 650, 900, 1400])
    assert step_match(STEPS, falling(STEPS), other, falling(other, speed=2)) == pytest.approx(0.5, rel=2e-2)
    assert step_match(other, falling(other), STEPS, falling(STEPS, speed=2)) == pytest.approx(0.5, rel=2e-2)


def test_a_step_of_zero_is_left_out():
    steps = np.array([0, *STEPS])
    losses = np.array([8.0, *falling(STEPS)])
    assert step_match(steps, losses, steps, losses) == pytest.approx(1.0)


def test_a_curve_matches_itself_plateaus_and_rises_included():
    losses = [5, 4, 4, 4.2, 3.9, 3.9, 3, 3.5, 2.9, 3]
    assert step_match(range(1, 11), losses, range(1, 11), losses, first=0) == pytest.approx(1.0)


def test_a_loss_is_reached_where_the_curve_first_crosses_it():
    # the other run is at 3 from step 20 on, and stays there
    assert step_match([50, 100], [4, 3], [10, 20, 40, 80], [4, 3, 3, 3], first=1) == pytest.approx(0.2)


def test_a_slow_run_is_read_where_it_got_to():
    other = falling(STEPS, speed=1 / 3)  # its last loss is what dense had after a third of the steps
    assert other[-1] > falling(STEPS)[-1]
    assert step_match(STEPS, falling(STEPS), STEPS, other) == pytest.approx(3.0, rel=1e-2)


def test_no_shared_loss_gives_nothing():
    assert step_match([1, 2, 3], [3, 2, 1], [1, 2, 3], [9, 8, 7]) is None
    assert step_match([1, 2, 3], [9, 8, 7], [1, 2, 3], [3, 2, 1]) is None
    far = falling(STEPS, speed=1 / 20)  # it reaches only what dense had in the first quarter, which is not looked at
    assert step_match(STEPS, falling(STEPS), STEPS, far) is None


def test_a_curve_needs_two_points():
    with pytest.raises(ValueError, match="two points after step 0, got 1"):
        step_match([0, 10], [2, 1], [0, 10], [2, 1])


def history(speed: float, seed: int = 0) -> History:
    noise = np.random.default_rng(seed).normal(0, 0.002, len(STEPS))
    losses = (falling(STEPS, speed=speed) + noise).tolist()
    steps = [0, *STEPS.tolist()]
    held_out = {"text": [9.0, *losses], "image": [8.0, *losses], ALL: [8.5, *losses]}
    return History(steps=steps, held_out=held_out, seconds=100 / speed, tokens=1000)


@pytest.fixture
def comparison() -> Comparison:
    return Comparison(
        names=["dense", "mot"],
        seeds=[0, 1, 2],
        settings=TrainSettings(),
        histories={name: [history(speed, seed) for seed in range(3)] for name, speed in (("dense", 1), ("mot", 2))},
        forward_flops={"dense": 100.0, "mot": 110.0},
        total_params={"dense": 10, "mot": 30},
        active_params={"dense": 10, "mot": 10},
    )


def test_rows_hold_sizes_losses_shares_and_spread(comparison):
    dense, mot = comparison.rows()
    assert comparison.modalities == ["text", "image", ALL]
    assert (dense["model"], mot["model"]) == ("dense", "mot")
    assert dense["share"] == {"text": None, "image": None, ALL: None}
    assert mot["share"]["text"]["mean"] == pytest.approx(0.5, rel=0.02)
    assert mot["share"]["text"]["n"] == 3
    assert mot["share"]["text"]["min"] <= mot["share"]["text"]["mean"] <= mot["share"]["text"]["max"]
    assert 0 < mot["share"]["text"]["std"] < 0.02
    assert mot["loss"][ALL]["mean"] == pytest.approx(falling(STEPS, speed=2)[-1], abs=0.01)
    assert mot["flops_ratio"] == pytest.approx(1.1)
    assert mot["time_ratio"] == pytest.approx(0.5)


def test_a_single_seed_has_no_spread(comparison):
    comparison.histories = {name: runs[:1] for name, runs in comparison.histories.items()}
    assert comparison.rows()[1]["share"]["text"]["std"] == 0


def test_seeds_without_a_shared_loss_are_left_out(comparison):
    comparison.histories["mot"][0] = history(1 / 30)
    assert len(comparison.shares("mot", "text")) == 2
    comparison.histories["mot"] = [history(1 / 30)] * 3
    assert comparison.rows()[1]["share"]["text"] is None


def test_it_is_saved_as_json_and_a_picture(comparison, tmp_path):
    folder = comparison.save(tmp_path / "new")
    read = json.loads((folder / "comparison.json").read_text())
    assert read == json.loads(json.dumps(comparison.to_dict()))
    assert read["baseline"] == "dense"
    assert len(read["histories"]["mot"]) == 3
    assert (folder / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_the_table_shows_what_was_measured_and_a_dash_where_nothing_was(comparison):
    from rich.console import Console

    from omnimoe.commands._tables import comparison_table

    def shown() -> str:
        console = Console(width=200, file=io.StringIO())
        console.print(comparison_table(comparison.rows(), comparison.modalities))
        return console.file.getvalue()

    assert "50 ± " in shown()
    assert "100 %" in shown()
    assert "(1.10x)" in shown()
    comparison.histories["mot"] = [history(1 / 30)] * 3
    comparison.forward_flops["mot"] = comparison.active_params["mot"] = None
    assert "–" in shown()
    assert "unknown" in shown()


def test_short_names_are_completed_with_a_size():
    assert resolve_names(["dense", "mot"], "nano") == ["dense_nano", "mot_nano"]
    assert resolve_names(["mot", "mot_nano"], "micro") == ["mot_micro", "mot_nano"]
    assert resolve_names(["nothing"], "nano") == ["nothing"]


@pytest.fixture
def registered():
    """Registers tiny models for one test."""
    names = []

    def add(name, config):
        MODELS.register(name)(lambda: config)
        names.append(name)
        return name

    yield add
    for name in names:
        MODELS.remove(name)


@pytest.fixture(scope="module")
def corpus() -> Corpus:
    return Corpus.load("p")


def test_two_models_end_to_end(registered, corpus, tmp_path):
    names = [registered("tiny_dense", tiny()), registered("tiny_mot", tiny("mot"))]
    seen: dict[tuple[str, int], list[torch.Tensor]] = {}
    finished = []

    def on_model(name, seed, run):
        finished.append((name, seed))
        assert run.settings.seed == seed
        again = type(run.batches)(run.model.config, run.settings, corpus, split="train", seed=run.settings.seed)
        seen[name, seed] = [next(again)["input_ids"] for _ in range(4)]
        assert again.state_dict() == run.batches.state_dict()

    run = settings(steps=4, evaluate_every=1, warmup=1)
    found = compare(names, run, seeds=(0, 3), corpus=corpus, out=tmp_path, show_progress=False, on_model=on_model)
    assert finished == [(name, seed) for seed in (0, 3) for name in names]
    for seed in (0, 3):
        assert all(map(torch.equal, seen["tiny_dense", seed], seen["tiny_mot", seed]))
    assert not torch.equal(seen["tiny_dense", 0][0], seen["tiny_dense", 3][0])
    dense, mot = found.rows()
    assert dense["active_params"] == mot["active_params"]
    assert mot["flops_ratio"] == pytest.approx(1.0)
    assert mot["total_params"] > dense["total_params"]
    assert all(history.steps == [0, 1, 2, 3, 4] for runs in found.histories.values() for history in runs)
    assert (tmp_path / "curves.png").is_file()
    assert (tmp_path / "comparison.json").is_file()
    for name in names:
        assert (tmp_path / "runs" / f"{name}-seed3" / "checkpoint" / "model.safetensors").is_file()


def test_a_part_that_does_not_state_its_cost_can_be_compared(registered, corpus):
    @register_experts("test_nothing")
    class Nothing(Experts):
        def __init__(self, config, *, hidden_size, num_modalities, layer_idx):
            super().__init__()

        def forward(self, x, rows):
            return 0 * x, None

    try:
        names = [registered("tiny_dense", tiny()), registered("tiny_none", tiny().replace(experts=Nothing.Config()))]
        row = compare(names, settings(steps=2, evaluate_every=1), corpus=corpus, show_progress=False).rows()[1]
    finally:
        EXPERTS.remove("test_nothing")
    assert row["flops_per_token"] is None
    assert row["flops_ratio"] is None
    assert math.isfinite(row["loss"][ALL]["mean"])


@pytest.mark.parametrize(
    ("names", "changes", "told"),
    [
        (["dense_nano"], {}, "two different models"),
        (["dense_nano", "dense_nano"], {}, "two different models"),
        (["dense_nano", "mot_nanno"], {}, "did you mean 'mot_nano'"),
        (["dense_nano", "mot_37m"], {}, "mot_37m has another vocabulary than dense_nano"),
        (["dense_nano", "mot_nano"], {"steps": 20, "evaluate_every": 25}, "give 1; evaluate more often"),
        (["dense_nano", "mot_nano"], {"evaluate_every": 0}, "give 1"),
        (["dense_nano", "mot_nano"], {"evaluate_batches": 0}, "give 0"),
    ],
)
def test_what_cannot_be_compared_is_refused_before_anything_is_trained(corpus, monkeypatch, names, changes, told):
    monkeypatch.setattr("omnimoe.compare.load", lambda *_args, **_kwargs: pytest.fail("a model was built"))
    with pytest.raises((ValueError, RegistryError, ConfigError), match=told):
        compare(names, settings(**changes), corpus=corpus)


def test_no_seed_is_refused(corpus):
    with pytest.raises(ValueError, match="at least one seed"):
        compare(["dense_nano", "mot_nano"], settings(), seeds=(), corpus=corpus)


def test_a_model_that_sees_later_tokens_is_pointed_out(registered, corpus, caplog):
    experts = RoutedExperts.Config(
        num_experts=6, intermediate_size=48, router=ByModalityRouter.Config(experts=(2, 2, 2))
    )
    names = [registered("tiny_dense", tiny()), registered("tiny_choice", tiny().replace(experts=experts))]
    with caplog.at_level(logging.WARNING):
        compare(names, settings(steps=2, evaluate_every=1), corpus=corpus, show_progress=False)
    assert "tiny_choice looks at later tokens" in caplog.text
    assert "tiny_dense looks" not in caplog.text


def test_models_of_unequal_cost_are_pointed_out(registered, corpus, caplog):
    wide = tiny().replace(experts=tiny().experts.replace(intermediate_size=192))
    names = [registered("tiny_dense", tiny()), registered("tiny_mot", tiny("mot")), registered("tiny_wide", wide)]
    with caplog.at_level(logging.WARNING):
        compare(names, settings(steps=2, evaluate_every=1), corpus=corpus, show_progress=False)
    assert "tiny_wide costs 1." in caplog.text
    assert "tiny_mot costs" not in caplog.text

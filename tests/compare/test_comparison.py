"""A comparison treats its models alike, and never mixes what looks ahead with what does not."""

from __future__ import annotations

import io
import json
import logging
import math

import numpy as np
import pytest
import torch

from omnimoe.backbone import LayerRange
from omnimoe.compare import ALL, CAUSAL, LOOKS_AHEAD, Comparison, RunError, compare
from omnimoe.config import ConfigError
from omnimoe.data import Corpus
from omnimoe.experts import Experts, RoutedExperts, register_experts
from omnimoe.experts.base import EXPERTS
from omnimoe.model import MODELS
from omnimoe.registry import RegistryError
from omnimoe.routers import ByModalityRouter, DepthRouter
from omnimoe.train import History, TrainSettings
from tests.compare.curves import STEPS, falling
from tests.train.runs import settings, tiny


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
        histories={
            name: {seed: history(speed, seed) for seed in range(3)} for name, speed in (("dense", 1), ("mot", 2))
        },
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
    gap = falling(STEPS, speed=2)[-1] - falling(STEPS)[-1]
    assert (dense["gap"]["text"], mot["gap"]["text"]["mean"]) == (None, pytest.approx(gap, abs=1e-9))
    assert mot["gap"]["text"]["half"] < 1e-9, "seed by seed, with the noise that both share"
    assert mot["loss"][ALL]["mean"] == pytest.approx(falling(STEPS, speed=2)[-1], abs=0.01)
    assert mot["flops_ratio"] == pytest.approx(1.1)
    assert mot["time_ratio"] == pytest.approx(0.5)


def test_a_single_seed_has_no_spread(comparison):
    comparison.histories = {name: {0: runs[0]} for name, runs in comparison.histories.items()}
    share = comparison.rows()[1]["share"]["text"]
    assert (share["std"], share["half"], share["n"]) == (0, None, 1)


def test_a_part_of_the_seeds_is_compared_with_the_same_seeds_of_the_baseline(comparison):
    del comparison.histories["dense"][1], comparison.histories["mot"][0]
    dense, mot = comparison.rows()
    assert (dense["seeds"], mot["seeds"]) == ([0, 2], [1, 2])
    assert mot["share"]["text"]["n"] == 1
    comparison.histories["mot"] = {}
    assert [row["model"] for row in comparison.rows()] == ["dense"]


def test_a_model_may_be_measured_in_the_steps_of_another_than_the_first(comparison):
    comparison.names += ["mamba", "mixture"]
    comparison.baselines = {"mixture": "mamba"}
    for name, speed in (("mamba", 0.8), ("mixture", 1.6)):
        comparison.histories[name] = {seed: history(speed, seed) for seed in range(3)}
        comparison.forward_flops[name], comparison.total_params[name] = 90.0, 12
        comparison.active_params[name] = 10
    _, _, mamba, mixture = comparison.rows()
    assert mamba["share"]["text"]["mean"] == pytest.approx(1 / 0.8, rel=0.02)
    assert mixture["share"]["text"]["mean"] == pytest.approx(0.5, rel=0.02)
    assert (mamba["flops_ratio"], mixture["flops_ratio"]) == (0.9, 1.0)


def test_what_looks_ahead_has_a_row_of_its_own(comparison):
    comparison.is_causal = {"dense": True, "mot": False}
    ahead = comparison.rows()[1:]
    assert [row["scored"] for row in ahead] == [LOOKS_AHEAD], "it has no causal form, and none is made up"
    for seed, run in comparison.histories["mot"].items():
        run.causal = history(1.25, seed).held_out
    rows = comparison.rows()
    assert [(row["model"], row["scored"]) for row in rows] == [("dense", CAUSAL), ("mot", LOOKS_AHEAD), ("mot", CAUSAL)]
    assert [row["share"]["text"]["mean"] for row in rows[1:]] == pytest.approx([0.5, 0.8], rel=0.02)
    assert rows[2]["loss"]["text"]["mean"] == pytest.approx(falling(STEPS, speed=1.25)[-1], abs=0.01)


def test_seeds_without_a_shared_loss_are_left_out(comparison):
    comparison.histories["mot"][0] = history(1 / 30)
    assert list(comparison.shares("mot", "text")) == [1, 2]
    comparison.histories["mot"] = {seed: history(1 / 30) for seed in range(3)}
    assert comparison.rows()[1]["share"]["text"] is None


def test_it_is_saved_as_json_and_a_picture(comparison, tmp_path):
    folder = comparison.save(tmp_path / "new")
    read = json.loads((folder / "comparison.json").read_text())
    assert read == json.loads(json.dumps(comparison.to_dict()))
    assert read["baseline"] == "dense"
    assert [run["seed"] for run in read["histories"]["mot"]] == [0, 1, 2]
    again = Comparison.from_dict(read)
    assert again.rows() == comparison.rows()
    assert again.modalities == comparison.modalities
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
    comparison.histories["mot"] = {seed: history(1 / 30) for seed in range(3)}
    comparison.forward_flops["mot"] = comparison.active_params["mot"] = None
    assert "–" in shown()
    assert "unknown" in shown()
    assert "looks ahead" not in shown()
    comparison.is_causal = {"mot": False}
    assert "looks ahead" in shown()


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
    assert all(run.steps == [0, 1, 2, 3, 4] for runs in found.histories.values() for run in runs.values())
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
    monkeypatch.setattr(
        "omnimoe.compare.comparison.train_run", lambda *_args, **_kwargs: pytest.fail("something was trained")
    )
    with pytest.raises((ValueError, RegistryError, ConfigError), match=told):
        compare(names, settings(**changes), corpus=corpus)


def test_no_seed_is_refused(corpus):
    with pytest.raises(ValueError, match="at least one seed"):
        compare(["dense_nano", "mot_nano"], settings(), seeds=(), corpus=corpus)


def test_a_model_that_sees_later_tokens_is_pointed_out_and_scored_both_ways(registered, corpus, caplog):
    experts = RoutedExperts.Config(
        num_experts=6, intermediate_size=48, router=ByModalityRouter.Config(experts=(2, 2, 2))
    )
    deep = tiny().replace(layers=(LayerRange(step=2, depth=DepthRouter.Config()),))
    names = [
        registered("tiny_dense", tiny()),
        registered("tiny_choice", tiny().replace(experts=experts)),
        registered("tiny_deep", deep),
    ]
    with caplog.at_level(logging.WARNING):
        found = compare(names, settings(steps=2, evaluate_every=1), corpus=corpus, show_progress=False)
    assert "tiny_choice looks at later tokens" in caplog.text
    assert "tiny_dense looks" not in caplog.text
    forms = [(row["model"].removeprefix("tiny_"), row["scored"]) for row in found.rows()]
    assert forms == [("dense", CAUSAL), ("choice", LOOKS_AHEAD), ("choice", CAUSAL), ("deep", LOOKS_AHEAD)]
    ahead, alone = (row["loss"][ALL]["mean"] for row in found.rows() if row["model"] == "tiny_choice")
    assert ahead != alone


def test_a_comparison_goes_on_where_it_was_left(registered, corpus, tmp_path):
    names = [registered("tiny_dense", tiny()), registered("tiny_mot", tiny("mot"))]
    run = settings(steps=4, evaluate_every=1, warmup=1)
    trained: list[tuple[str, int]] = []

    def go(**changes):
        trained.clear()
        return compare(
            names,
            run.replace(**changes),
            seeds=(0, 1),
            corpus=corpus,
            out=tmp_path,
            resume=True,
            show_progress=False,
            on_model=lambda name, seed, _: trained.append((name, seed)),
        )

    first = go()
    assert len(trained) == 4
    (tmp_path / "runs" / "tiny_mot-seed1" / "run.json").unlink()
    again = go()
    assert trained == [("tiny_mot", 1)]
    assert [row["share"] for row in again.rows()] == [row["share"] for row in first.rows()]
    with pytest.raises(RunError, match="tiny_dense-seed0 holds another run: learning_rate was"):
        go(learning_rate=0.1)
    MODELS.register("tiny_mot", exist_ok=True)(lambda: tiny("mot").replace(num_layers=1))
    with pytest.raises(RunError, match="tiny_mot is declared otherwise since; take another folder"):
        go()


def test_there_is_nothing_to_resume_without_a_folder(corpus):
    with pytest.raises(ValueError, match="without out= there is nothing to resume"):
        compare(["dense_nano", "mot_nano"], settings(), corpus=corpus, resume=True)


def test_models_of_unequal_cost_are_pointed_out(registered, corpus, caplog):
    wide = tiny().replace(experts=tiny().experts.replace(intermediate_size=192))
    names = [registered("tiny_dense", tiny()), registered("tiny_mot", tiny("mot")), registered("tiny_wide", wide)]
    with caplog.at_level(logging.WARNING):
        compare(names, settings(steps=2, evaluate_every=1), corpus=corpus, show_progress=False)
    assert "tiny_wide costs 1." in caplog.text
    assert "tiny_mot costs" not in caplog.text

"""What decays, and the schedule."""

from __future__ import annotations

import itertools

import pytest
from torch import nn

from omnimoe.train import TrainSettings, learning_rate, make_optimizer
from tests.train.runs import build, tiny


@pytest.mark.parametrize("kind", ["dense", "mot", "top_k", "expert_choice"])
def test_matrices_decay_and_norms_do_not(kind):
    model = build(tiny(kind))
    decayed, kept = make_optimizer(model, TrainSettings(weight_decay=0.3)).param_groups
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    assert decayed["weight_decay"] == 0.3
    assert kept["weight_decay"] == 0
    assert {names[id(held)] for held in kept["params"]} == {name for name in names.values() if "norm" in name}
    assert len(decayed["params"]) + len(kept["params"]) == len(names)


def test_biases_vectors_and_frozen_weights():
    model = nn.Sequential(nn.Linear(3, 3), nn.LayerNorm(3), nn.Linear(3, 3))
    model[2].weight.requires_grad_(False)
    decayed, kept = make_optimizer(model, TrainSettings()).param_groups
    assert [id(held) for held in decayed["params"]] == [id(model[0].weight)]
    assert len(kept["params"]) == 4


def test_a_parameter_of_the_module_itself_has_a_place():
    decayed, kept = make_optimizer(nn.Linear(3, 3), TrainSettings()).param_groups
    assert (len(decayed["params"]), len(kept["params"])) == (1, 1)


def test_the_optimizer_takes_its_numbers_from_the_settings():
    settings = TrainSettings(learning_rate=0.5, beta1=0.1, beta2=0.2, epsilon=0.3)
    defaults = make_optimizer(nn.Linear(3, 3), settings).defaults
    assert (defaults["lr"], defaults["betas"], defaults["eps"]) == (0.5, (0.1, 0.2), 0.3)


def test_the_schedule_rises_to_the_peak_and_falls_to_its_share():
    settings = TrainSettings(steps=100, warmup=10, learning_rate=2.0, final_learning_rate=0.1)
    rates = [learning_rate(step, settings) for step in range(101)]
    assert rates[0] == pytest.approx(0.2)
    assert rates[9] == rates[10] == pytest.approx(2.0)
    assert rates[55] == pytest.approx(2.0 * (0.1 + 0.9 / 2))
    assert rates[100] == pytest.approx(0.2)
    assert all(before >= after for before, after in itertools.pairwise(rates[10:]))
    assert learning_rate(500, settings) == pytest.approx(0.2)


def test_a_schedule_without_warm_up_starts_at_the_peak():
    assert learning_rate(0, TrainSettings(warmup=0, learning_rate=3.0)) == 3.0


def test_a_run_shorter_than_its_warm_up_never_reaches_the_peak():
    settings = TrainSettings(steps=5, warmup=10, learning_rate=1.0)
    assert [learning_rate(step, settings) for step in range(5)] == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.5])

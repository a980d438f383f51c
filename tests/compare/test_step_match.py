"""The measure finds known factors, and an interval is Student's."""

from __future__ import annotations

import math
import statistics

import numpy as np
import pytest

from omnimoe.compare import spread, step_match
from omnimoe.compare.step_match import _quantile
from tests.compare.curves import STEPS, falling


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


@pytest.mark.parametrize(
    ("degrees", "quantile"),
    [(1, 12.7062), (2, 4.3027), (9, 2.2622), (20, 2.0860), (21, 2.0796), (30, 2.0423), (120, 1.9799)],
)
def test_quantiles_are_those_of_the_tables(degrees, quantile):
    assert _quantile(degrees) == pytest.approx(quantile, abs=1e-3)


def test_the_interval_of_three_seeds():
    found = spread([0.5, 0.6, 0.8])
    assert found["mean"] == pytest.approx(0.6333, abs=1e-4)
    assert found["half"] == pytest.approx(4.303 * statistics.stdev([0.5, 0.6, 0.8]) / math.sqrt(3))
    assert (found["min"], found["max"], found["n"]) == (0.5, 0.8, 3)


def test_an_interval_holds_the_true_mean_as_often_as_it_says():
    drawn = np.random.default_rng(0).normal(0.7, 0.1, (2000, 3))
    held = [abs(found["mean"] - 0.7) <= found["half"] for found in map(spread, drawn.tolist())]
    assert np.mean(held) == pytest.approx(0.95, abs=0.015)


def test_one_seed_has_no_interval_and_none_has_nothing():
    assert spread([0.5]) == {"mean": 0.5, "std": 0.0, "half": None, "min": 0.5, "max": 0.5, "n": 1}
    assert spread([]) is None

"""Rows in the order of time: how they enter with the time of their noise, and what is refused."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from omnimoe.config import ConfigError
from omnimoe.modalities import Trajectory


def made(**fields) -> Trajectory:
    torch.manual_seed(0)
    part = Trajectory.Config(name="action", channels=3, **fields).build(hidden_size=8)
    for parameter in part.parameters():
        parameter.data.normal_()
    return part


def test_a_row_and_its_time_go_through_one_network():
    part = made(min_period=0.1, max_period=2.0)
    rows, times = torch.randn(4, 3), torch.tensor([0.0, 0.3, 0.3, 1.0])
    found = part.embed(rows, times)
    for row, time, got in zip(rows, times.tolist(), found, strict=True):
        periods = [0.1 * 20.0 ** (place / 3) for place in range(4)]
        code = [turn(2 * math.pi * time / period) for turn in (math.sin, math.cos) for period in periods]
        into = torch.cat((part.in_proj @ row + part.in_bias, torch.tensor(code)))
        wanted = part.time_out(F.silu(part.time_in(into)))
        torch.testing.assert_close(got, wanted, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(part.embed(rows), part.embed(rows, torch.zeros(4)))
    torch.testing.assert_close(part.head(found), found @ part.out_proj.T + part.out_bias)


def test_steps_from_noise_to_data_follow_a_straight_line():
    part = made()
    clean, noise = torch.randn(4, 3), torch.randn(4, 3)
    noisy, velocity = part.corrupt(clean, torch.full((4,), 0.7), noise)
    torch.testing.assert_close(noisy, 0.3 * clean + 0.7 * noise)
    torch.testing.assert_close(part.step(noisy, velocity, 0.7, 0.0), clean)


def test_what_it_costs():
    part = made()
    matrices = (part.in_proj, part.out_proj, part.time_in.weight, part.time_out.weight)
    assert part.config.active_params(8) == sum(matrix.numel() for matrix in matrices)


@pytest.mark.parametrize("periods", [(0.0, 1.0), (2.0, 1.0), (1.0, 1.0)])
def test_periods_that_mean_nothing(periods):
    with pytest.raises(ConfigError, match="min_period below max_period"):
        made(min_period=periods[0], max_period=periods[1])


def test_an_odd_width():
    with pytest.raises(ConfigError, match="even width, got 7"):
        Trajectory.Config(name="action").build(hidden_size=7)

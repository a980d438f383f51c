"""Continuous latents: noise goes in as it comes out."""

from __future__ import annotations

import math

import pytest
import torch

from omnimoe.modalities import Patches


def side(objective: str, hidden_size: int = 16) -> Patches:
    return Patches.Config(name="latent", channels=6, objective=objective).build(hidden_size=hidden_size)


def truth(patches: Patches, clean: torch.Tensor, noisy: torch.Tensor, time: float) -> torch.Tensor:
    """What a perfect head would say: the noise, or the velocity from data to noise."""
    signal, scale = patches.schedule(torch.tensor(time))
    noise = (noisy - signal * clean) / scale
    return noise if patches.config.objective == "ddpm" else noise - clean


@pytest.mark.parametrize("objective", ["flow", "ddpm"])
@pytest.mark.parametrize("steps", [1, 4, 25])
def test_denoising_with_the_true_prediction_recovers_the_data(objective, steps):
    patches, clean = side(objective), torch.randn(5, 6)
    noisy, _ = patches.corrupt(clean, torch.ones(5), torch.randn(5, 6))
    for step in range(steps):
        time, next_time = 1 - step / steps, 1 - (step + 1) / steps
        noisy = patches.step(noisy, truth(patches, clean, noisy, time), time, next_time)
    torch.testing.assert_close(noisy, clean, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("objective", ["flow", "ddpm"])
def test_a_step_lands_where_corruption_by_the_same_noise_would(objective):
    patches, clean, noise = side(objective), torch.randn(5, 6), torch.randn(5, 6)
    start, target = patches.corrupt(clean, torch.full((5,), 0.8), noise)
    wanted, _ = patches.corrupt(clean, torch.full((5,), 0.3), noise)
    torch.testing.assert_close(patches.step(start, target, 0.8, 0.3), wanted, atol=1e-4, rtol=1e-4)


def test_flow_is_the_straight_line_and_its_target_the_velocity():
    patches, clean, noise = side("flow"), torch.randn(3, 6), torch.randn(3, 6)
    time = torch.tensor([0.0, 0.25, 1.0])
    noisy, target = patches.corrupt(clean, time, noise)
    assert torch.equal(noisy[0], clean[0])
    assert torch.equal(noisy[2], noise[2])
    torch.testing.assert_close(noisy[1], 0.75 * clean[1] + 0.25 * noise[1])
    assert torch.equal(target, noise - clean)


def test_ddpm_keeps_the_variance_and_predicts_the_noise():
    patches, noise = side("ddpm"), torch.randn(3, 6)
    signal, scale = patches.schedule(torch.linspace(0, 1, 11))
    torch.testing.assert_close(signal**2 + scale**2, torch.ones(11))
    assert (signal[:-1] > signal[1:]).all()
    assert signal[-1] > 0
    assert signal[0].item() == pytest.approx(math.cos(0.008 / 1.008 * math.pi / 2), abs=1e-6)
    assert torch.equal(patches.corrupt(torch.randn(3, 6), torch.rand(3), noise)[1], noise)


@pytest.mark.parametrize("hidden_size", [16, 7])
def test_rows_enter_as_a_linear_map_plus_a_code_of_the_time(hidden_size):
    patches, rows = side("flow", hidden_size), torch.randn(4, 6)
    clean = patches.embed(rows)
    assert clean.shape == (4, hidden_size)
    assert torch.equal(clean, patches.embed(rows, torch.zeros(4)))
    noisy = patches.embed(rows, torch.tensor([0.0, 0.1, 0.5, 1.0]))
    assert torch.equal(noisy[0], clean[0])
    assert not torch.isclose(noisy[1:], clean[1:], atol=1e-3).all(-1).any()
    torch.testing.assert_close(patches.embed(2 * rows) - clean, rows @ patches.in_proj.T)


def test_the_head_starts_at_zero_and_the_loss_is_the_mean_square_of_each_row():
    patches = side("flow")
    assert not patches.head(torch.randn(3, 16)).any()
    outputs, targets = torch.randn(3, 6), torch.randn(3, 6)
    torch.testing.assert_close(patches.loss(outputs, targets), ((outputs - targets) ** 2).mean(1))
    assert patches.loss(outputs.bfloat16(), targets).dtype == torch.float32

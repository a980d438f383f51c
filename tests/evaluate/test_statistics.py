"""Formulas against closed forms, numbers worked out by hand, and other libraries where they are installed."""

from __future__ import annotations

import math

import numpy as np
import pytest

from omnimoe.evaluate import frechet_distance, kernel_distance, psnr, ssim, wilson, word_errors


def test_wilson_against_published_values():
    # Newcombe, "Two-sided confidence intervals for the single proportion", 1998, table I
    for wins, count, low, high in ((81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0, 0.1611)):
        assert wilson(wins, count) == pytest.approx((low, high), abs=1e-4)
    assert wilson(29, 29) == pytest.approx((0.8830, 1), abs=1e-4)


@pytest.mark.parametrize(("wins", "count"), [(1, 0), (5, 4), (-1, 4)])
def test_wilson_refuses_what_is_no_count(wins, count):
    with pytest.raises(ValueError, match="an interval needs trials"):
        wilson(wins, count)


def test_frechet_distance_of_gaussians_in_closed_form():
    """For commuting covariances: |m1 - m2|^2 + sum((s1 - s2)^2); samples are made to have exactly these moments."""
    generator = np.random.default_rng(0)
    means, deviations = np.array([[0, 1, 2, 3.0], [1, 1, 0, 3.0]]), np.array([[1, 2, 0.5, 3.0], [2, 2, 1.5, 1.0]])
    turn = np.linalg.qr(generator.normal(size=(4, 4)))[0]
    samples = []
    for mean, deviation, count in zip(means, deviations, (50, 80), strict=True):
        raw = generator.normal(size=(count, 4))
        raw -= raw.mean(0)
        white = raw @ np.linalg.inv(np.linalg.cholesky(np.cov(raw.T))).T
        samples.append((white * deviation + mean) @ turn)
    expected = ((means[0] - means[1]) ** 2).sum() + ((deviations[0] - deviations[1]) ** 2).sum()
    assert frechet_distance(*samples) == pytest.approx(expected, rel=1e-9)
    assert frechet_distance(samples[0], samples[0]) == pytest.approx(0, abs=1e-9)


def test_frechet_distance_against_the_root_of_matrices():
    linalg = pytest.importorskip("scipy.linalg")
    generator = np.random.default_rng(1)
    x, y = generator.normal(size=(60, 8)), generator.normal(size=(90, 8)) @ generator.normal(size=(8, 8)) + 1
    c1, c2 = np.cov(x.T), np.cov(y.T)
    root = np.real(np.trace(linalg.sqrtm(c1 @ c2)))
    expected = ((x.mean(0) - y.mean(0)) ** 2).sum() + np.trace(c1) + np.trace(c2) - 2 * root
    assert frechet_distance(x, y) == pytest.approx(expected, rel=1e-6)


def test_frechet_distance_of_fewer_samples_than_features():
    generator = np.random.default_rng(2)
    x, y = generator.normal(size=(10, 300)), generator.normal(size=(12, 300))
    assert math.isfinite(frechet_distance(x, y))
    assert frechet_distance(x, y) == pytest.approx(frechet_distance(y, x))
    assert frechet_distance(x, x + 1) == pytest.approx(300)


def test_kernel_distance_against_plain_sums():
    generator = np.random.default_rng(3)
    x, y = generator.normal(size=(5, 6)), generator.normal(size=(4, 6)) + 0.5
    kernel = lambda a, b: (a @ b / 6 + 1) ** 3  # noqa: E731
    within_x = [kernel(x[i], x[j]) for i in range(5) for j in range(5) if i != j]
    within_y = [kernel(y[i], y[j]) for i in range(4) for j in range(4) if i != j]
    across = [kernel(a, b) for a in x for b in y]
    assert kernel_distance(x, y)[0] == pytest.approx(np.mean(within_x) + np.mean(within_y) - 2 * np.mean(across))


def test_kernel_distance_error_is_the_jackknife():
    generator = np.random.default_rng(4)
    x, y = generator.normal(size=(7, 5)), generator.normal(size=(6, 5)) + 1
    without_x = np.array([kernel_distance(np.delete(x, i, 0), y)[0] for i in range(7)])
    without_y = np.array([kernel_distance(x, np.delete(y, i, 0))[0] for i in range(6)])
    expected = math.sqrt(6 * without_x.var() + 5 * without_y.var())
    assert kernel_distance(x, y)[1] == pytest.approx(expected)


def test_kernel_distance_is_zero_on_average_for_one_distribution_and_not_for_two():
    generator = np.random.default_rng(5)
    draw = lambda shift=0.0: generator.normal(size=(30, 16)) + shift  # noqa: E731
    same = np.array([kernel_distance(draw(), draw()) for _ in range(200)])
    assert abs(same[:, 0].mean()) < 3 * same[:, 0].std() / 200**0.5
    assert (same[:, 0] < 0).any()
    covered = np.abs(same[:, 0]) < 1.96 * same[:, 1]
    assert covered.mean() > 0.9
    distance, error = kernel_distance(draw(), draw(1.0))
    assert distance > 3 * error


@pytest.mark.parametrize("formula", [frechet_distance, kernel_distance])
@pytest.mark.parametrize("shapes", [((5, 3), (5, 4)), ((1, 3), (5, 3)), ((5,), (5, 3))])
def test_distances_refuse_what_does_not_fit(formula, shapes):
    with pytest.raises(ValueError, match="two samples of equally many features"):
        formula(*(np.zeros(shape) for shape in shapes))


def test_psnr_by_hand():
    black, grey = np.zeros((4, 4, 3), np.uint8), np.full((4, 4, 3), 51, np.uint8)
    assert psnr(black, grey) == pytest.approx(20 * math.log10(5))
    assert psnr(grey, grey) == 100
    with pytest.raises(ValueError, match="one shape"):
        psnr(black, grey[:2])


def test_ssim_of_flat_pictures_in_closed_form():
    one, two = np.full((16, 16, 3), 100, np.uint8), np.full((16, 16, 3), 150, np.uint8)
    c1 = (0.01 * 255) ** 2
    assert ssim(one, two) == pytest.approx((2 * 100 * 150 + c1) / (100**2 + 150**2 + c1))
    assert ssim(one, one) == pytest.approx(1)
    with pytest.raises(ValueError, match="smaller than the window"):
        ssim(one[:8], two[:8])


def test_ssim_against_scikit_image():
    metrics = pytest.importorskip("skimage.metrics")
    generator = np.random.default_rng(6)
    picture = generator.integers(0, 256, (40, 32, 3)).astype(np.uint8)
    other = np.clip(picture + generator.normal(0, 30, picture.shape), 0, 255).astype(np.uint8)
    whole = metrics.structural_similarity(
        picture, other, channel_axis=2, gaussian_weights=True, sigma=1.5, use_sample_covariance=False, full=True
    )[1]
    # theirs pads at the edges, ours takes the windows that lie inside
    assert ssim(picture, other) == pytest.approx(whole[5:-5, 5:-5].mean(), rel=1e-6)


@pytest.mark.parametrize(
    ("heard", "said", "errors"),
    [
        ("a red apple", "a red apple", 0),
        ("", "a red apple", 3),
        ("a red apple", "", 3),
        ("red apple", "a red apple", 1),
        ("a bread apple pie", "a red apple", 2),
        ("apple red a", "a red apple", 2),
    ],
)
def test_word_errors_by_hand(heard, said, errors):
    assert word_errors(heard.split(), said.split()) == errors

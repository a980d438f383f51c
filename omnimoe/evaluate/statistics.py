"""The formulas: intervals, distances between sets of features, fidelity of pictures, word errors."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

Z95 = 1.959964
"""Half the width of a 95 % interval of a normal distribution, in standard deviations."""


def wilson(wins: float, count: int, z: float = Z95) -> tuple[float, float]:
    """Wilson's interval for the share of successes in independent trials.

    Args:
        wins: successes; a tie may count as a part of one.
        count: trials.
        z: width, in standard deviations of a normal distribution.

    Returns:
        Lower and upper end, in [0, 1].

    Raises:
        ValueError: if there are no trials, or more successes than trials.

    Source: E. B. Wilson, "Probable inference, the law of succession, and statistical inference", JASA 22 (1927).

    Example:
        >>> low, high = wilson(5, 10)
        >>> round(low, 4), round(high, 4)
        (0.2366, 0.7634)
    """
    if count < 1 or not 0 <= wins <= count:
        raise ValueError(f"an interval needs trials and at most as many successes, got {wins} of {count}")
    share = wins / count
    middle = share + z * z / (2 * count)
    half = z * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    below = 1 + z * z / count
    return max(0.0, (middle - half) / below), min(1.0, (middle + half) / below)


def frechet_distance(x: np.ndarray, y: np.ndarray) -> float:
    """Fréchet distance between the Gaussians with the means and covariances of two samples.

    ``|m_x - m_y|^2 + tr(C_x + C_y - 2 (C_x C_y)^{1/2})``. The trace of the root is the sum of the singular values of
    the product of the centred samples, so nothing of size ``(D, D)`` is made and fewer samples than features are no
    special case. It is biased upwards for small samples: compare only values over equally many.

    Args:
        x: ``(m, D)`` features, ``m`` at least 2.
        y: ``(n, D)`` features, ``n`` at least 2.

    Returns:
        The distance, squared as is customary for FID.

    Raises:
        ValueError: if the shapes do not fit.

    Source: D. C. Dowson and B. V. Landau, "The Fréchet distance between multivariate normal distributions", 1982; as a
    measure of generated pictures, https://arxiv.org/abs/1706.08500.
    """
    x, y = _samples(x, y)
    a = (x - x.mean(0)) / math.sqrt(len(x) - 1)
    b = (y - y.mean(0)) / math.sqrt(len(y) - 1)
    root = np.linalg.svd(a @ b.T, compute_uv=False).sum()
    return float(((x.mean(0) - y.mean(0)) ** 2).sum() + (a**2).sum() + (b**2).sum() - 2 * root)


def kernel_distance(x: np.ndarray, y: np.ndarray) -> tuple[float, float]:
    """Squared maximum mean discrepancy under the kernel ``(x . y / D + 1)^3``, unbiased, with its standard error.

    Zero on average if both samples are of one distribution, whatever their sizes; so a single value may be negative.

    Args:
        x: ``(m, D)`` features, ``m`` at least 3.
        y: ``(n, D)`` features, ``n`` at least 3.

    Returns:
        The distance, and its standard error by the delete-one jackknife over both samples.

    Raises:
        ValueError: if the shapes do not fit.

    Source: the kernel inception distance, https://arxiv.org/abs/1801.01401.
    """
    x, y = _samples(x, y, least=3)
    m, n = len(x), len(y)
    within_x, within_y, across = (_kernel(*pair) for pair in ((x, x), (y, y), (x, y)))
    np.fill_diagonal(within_x, 0)
    np.fill_diagonal(within_y, 0)
    total_x, total_y, total = within_x.sum(), within_y.sum(), across.sum()
    mean_x, mean_y = total_x / (m * (m - 1)), total_y / (n * (n - 1))
    distance = mean_x + mean_y - 2 * total / (m * n)
    # what the distance would be without each of the samples
    without_x = (total_x - 2 * within_x.sum(1)) / ((m - 1) * (m - 2)) - 2 * (total - across.sum(1)) / ((m - 1) * n)
    without_y = (total_y - 2 * within_y.sum(1)) / ((n - 1) * (n - 2)) - 2 * (total - across.sum(0)) / (m * (n - 1))
    variance = (m - 1) * without_x.var() + (n - 1) * without_y.var()
    return float(distance), math.sqrt(variance)


def psnr(picture: np.ndarray, other: np.ndarray) -> float:
    """Peak signal-to-noise ratio of two 8-bit pictures.

    Args:
        picture: ``(H, W, 3)`` uint8.
        other: the same shape.

    Returns:
        Decibels; 100 for equal pictures, in place of infinity.

    Raises:
        ValueError: if the shapes differ.
    """
    picture, other = _pictures(picture, other)
    error = float(((picture - other) ** 2).mean())
    return min(100.0, 10 * math.log10(255**2 / error)) if error else 100.0


def ssim(picture: np.ndarray, other: np.ndarray) -> float:
    """Structural similarity of two 8-bit pictures: a Gaussian window of 11 x 11 with a deviation of 1.5 pixels.

    Args:
        picture: ``(H, W, 3)`` uint8, at least 11 pixels each way.
        other: the same shape.

    Returns:
        The mean over channels and over the windows that lie inside; 1 for equal pictures.

    Raises:
        ValueError: if the shapes differ or are too small.

    Source: Wang, Bovik, Sheikh and Simoncelli, "Image quality assessment", IEEE TIP 13 (2004).
    """
    x, y = _pictures(picture, other)
    if min(x.shape[:2]) < 11:
        raise ValueError(f"a picture of {x.shape[0]} x {x.shape[1]} is smaller than the window of 11 x 11")
    weights = np.exp(-((np.arange(11) - 5) ** 2) / (2 * 1.5**2))
    weights /= weights.sum()

    def blurred(values: np.ndarray) -> np.ndarray:
        for axis in (0, 1):
            values = np.lib.stride_tricks.sliding_window_view(values, 11, axis=axis) @ weights
        return values

    mean_x, mean_y = blurred(x), blurred(y)
    var_x, var_y = blurred(x * x) - mean_x**2, blurred(y * y) - mean_y**2
    covariance = blurred(x * y) - mean_x * mean_y
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    score = (2 * mean_x * mean_y + c1) * (2 * covariance + c2)
    return float((score / ((mean_x**2 + mean_y**2 + c1) * (var_x + var_y + c2))).mean())


def word_errors(heard: Sequence[str], said: Sequence[str]) -> int:
    """Least number of words to replace, drop or put in so that one sequence of words becomes the other.

    Args:
        heard: words of the transcript.
        said: words of the reference.

    Returns:
        The number; over all clips, divided by the number of words said, it is the word error rate.

    Example:
        >>> word_errors("a red apples".split(), "red apple pie".split())
        3
    """
    row = list(range(len(said) + 1))
    for i, word in enumerate(heard, start=1):
        above, row = row, [i]
        for j, wanted in enumerate(said, start=1):
            row.append(min(above[j] + 1, row[j - 1] + 1, above[j - 1] + (word != wanted)))
    return row[-1]


def _kernel(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return (x @ y.T / x.shape[1] + 1) ** 3


def _samples(x: np.ndarray, y: np.ndarray, least: int = 2) -> tuple[np.ndarray, np.ndarray]:
    x, y = np.asarray(x, dtype=np.float64), np.asarray(y, dtype=np.float64)
    if x.ndim != 2 or y.ndim != 2 or x.shape[1] != y.shape[1] or min(len(x), len(y)) < least:
        raise ValueError(
            f"two samples of equally many features and at least {least} rows are compared, got {x.shape} and {y.shape}"
        )
    return x, y


def _pictures(picture: np.ndarray, other: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    if picture.shape != other.shape or picture.ndim != 3:
        raise ValueError(f"pictures must have one shape (H, W, 3), got {picture.shape} and {other.shape}")
    return picture.astype(np.float64), other.astype(np.float64)

"""How much less training a model needs than another to reach the same losses, and how sure one can be of a mean.

The measure is that of Mixture-of-Transformers (https://arxiv.org/abs/2411.04996): for every step of the dense run, find
the step at which the other run had the same loss; the slope of the second against the first is the share of the dense
model's steps, and so of its FLOPs, that the other model needs. It is taken for each modality by itself.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

import numpy as np

_QUANTILES = (
    *(12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228),
    *(2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086),
)
"""Student's t at 97.5 %, for 1 to 20 degrees of freedom."""


def step_match(
    dense_steps: Sequence[float],
    dense_losses: Sequence[float],
    other_steps: Sequence[float],
    other_losses: Sequence[float],
    *,
    first: float = 0.25,
) -> float | None:
    """The share of the dense run's steps that another run needs to reach the same losses.

    Of both curves only the points count that are lower than all before. The other run reaches a loss where its curve
    first crosses it, read between its points on a logarithmic axis of steps. The result is the least-squares slope
    through the origin of the other run's steps against the dense run's, over the dense run's points from ``first`` of
    its length on whose loss the other run reached too.

    Args:
        dense_steps: steps of the dense run's evaluations, rising; a step 0 is left out.
        dense_losses: its losses there.
        other_steps: steps of the other run's evaluations.
        other_losses: its losses there.
        first: share of the dense run that is left out at its start, where every model falls fast.

    Returns:
        The share: 0.5 for half the steps; above 1 the other run is slower. None where no losses are shared.

    Raises:
        ValueError: if a curve has fewer than two points after step 0.

    Example:
        >>> steps = [100, 200, 400, 800]
        >>> round(step_match(steps, [4, 3, 2, 1], [50, 100, 200, 400], [4, 3, 2, 1]), 3)
        0.5
    """
    dense, other = _curve(dense_steps, dense_losses), _curve(other_steps, other_losses)
    lowest = np.minimum.accumulate(other[1])
    pairs, reached = [], math.inf
    for step, loss in zip(*dense, strict=True):
        # a point on a plateau would count the steps of reaching its loss twice
        is_new, reached = loss < reached, min(loss, reached)
        if is_new and step >= first * dense[0][-1] and lowest[-1] <= loss <= lowest[0]:
            pairs.append((step, _crossing(other[0], lowest, loss)))
    if not pairs:
        return None
    x, y = np.array(pairs).T
    return float((x * y).sum() / (x * x).sum())


def _crossing(steps: np.ndarray, lowest: np.ndarray, loss: float) -> float:
    """The step at which a falling curve first reaches ``loss``, which it does."""
    after = int(np.searchsorted(-lowest, -loss, side="left"))
    if after == 0:
        return float(steps[0])
    share = (lowest[after - 1] - loss) / (lowest[after - 1] - lowest[after])
    before, then = np.log(steps[after - 1]), np.log(steps[after])
    return float(np.exp(before + share * (then - before)))


def _curve(steps: Sequence[float], losses: Sequence[float]) -> tuple[np.ndarray, np.ndarray]:
    kept = [(step, loss) for step, loss in zip(steps, losses, strict=True) if step > 0]
    if len(kept) < 2:
        raise ValueError(f"a curve needs two points after step 0, got {len(kept)}; evaluate more often")
    x, y = np.array(kept, dtype=np.float64).T
    return x, y


def spread(values: Sequence[float]) -> dict[str, float | None] | None:
    """Mean and spread of what several seeds gave.

    Args:
        values: one a seed.

    Returns:
        ``mean``, ``std`` of the sample, ``min``, ``max``, the number ``n``, and ``half``, half the width of the 95 %
        interval of the mean by Student's t, None for a single value; None where there is no value.

    Example:
        >>> found = spread([0.5, 0.6, 0.7])
        >>> round(found["mean"], 3), round(found["half"], 3), spread([])
        (0.6, 0.248, None)
    """
    if not values:
        return None
    count, std = len(values), statistics.stdev(values) if len(values) > 1 else 0.0
    half = _quantile(count - 1) * std / math.sqrt(count) if count > 1 else None
    return {
        "mean": statistics.mean(values),
        "std": std,
        "half": half,
        "min": min(values),
        "max": max(values),
        "n": count,
    }


def _quantile(degrees: int) -> float:
    if degrees <= len(_QUANTILES):
        return _QUANTILES[degrees - 1]
    z = statistics.NormalDist().inv_cdf(0.975)
    return z + (z**3 + z) / (4 * degrees) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * degrees**2)

"""Seconds a training step, measured in turns: of two models in one process, so that what slows one slows the other."""

from __future__ import annotations

import statistics
from typing import Any

from omnimoe.data import Corpus
from omnimoe.hub import load
from omnimoe.train import Training, TrainSettings

WARM_UP = 2
"""Steps before the clock counts."""


def seconds_per_step(
    name: str, base: str, settings: TrainSettings, *, corpus: Corpus, rounds: int = 9, device: str = "cpu"
) -> dict[str, Any]:
    """What a training step of one model takes beside one of another.

    Args:
        name: zoo name.
        base: the model it stands beside.
        settings: of the steps; nothing is evaluated and nothing kept.
        corpus: what they train on.
        rounds: steps of each, in turns.
        device: where.

    Returns:
        ``seconds`` of the model and ``base_seconds``, medians over rounds; ``ratio``, the median over rounds of the
        quotient, and ``ratios``, all of them.
    """
    still = settings.replace(evaluate_batches=0, evaluate_every=0, steps=max(settings.steps, WARM_UP + rounds + 1))
    both = [
        Training(load(held, seed=settings.seed).to(device), still, corpus=corpus, show_progress=False)
        for held in (base, name)
    ]
    for training in both:
        training.run(until=WARM_UP)
    taken: list[tuple[float, float]] = []
    for number in range(WARM_UP + 1, WARM_UP + rounds + 1):
        before = [training.history.seconds for training in both]
        spent = [training.run(until=number).seconds - start for training, start in zip(both, before, strict=True)]
        taken.append((spent[0], spent[1]))
    ratios = [other / first for first, other in taken]
    return {
        "model": name,
        "base": base,
        "base_seconds": statistics.median(first for first, _ in taken),
        "seconds": statistics.median(other for _, other in taken),
        "ratio": statistics.median(ratios),
        "ratios": ratios,
    }

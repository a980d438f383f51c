"""Architectures side by side: trained on equal data, compared by the share of the dense model's steps they need.

The measure is that of Mixture-of-Transformers (https://arxiv.org/abs/2411.04996): for every step of the dense run, find
the step at which the other run had the same loss; the slope of the second against the first is the share of the dense
model's steps, and so of its FLOPs, that the other model needs. It is taken for each modality by itself.
"""

from __future__ import annotations

import json
import logging
import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

import omnimoe
from omnimoe.data import Corpus
from omnimoe.flops import UnknownCostError, flops
from omnimoe.hub import load, model_info
from omnimoe.model import MODELS, OmniMoeConfig, OmniMoeForCausalLM
from omnimoe.train import History, Training, TrainSettings

ALL = "all"

_EQUAL = 0.02
"""Models whose FLOPs differ by no more than this share count as equal; routers cost that little."""

logger = logging.getLogger(__name__)


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


@dataclass(kw_only=True)
class Comparison:
    """What :func:`compare` measured.

    Args:
        names: models in the order given; the first is the one others are compared with.
        seeds: seeds that each was trained with.
        settings: of every run, but for the seed.
        histories: model to one history a seed.
        environment: date, versions and the revision of the corpus.
        forward_flops: model to forward FLOPs of a token of the training mix; None where a part does not state its cost.
        total_params: model to parameters stored.
        active_params: model to parameters a token meets, the mean over modalities; None where unknown.
    """

    names: list[str]
    seeds: list[int]
    settings: TrainSettings
    histories: dict[str, list[History]] = field(default_factory=dict)
    environment: dict[str, str] = field(default_factory=dict)
    forward_flops: dict[str, float | None] = field(default_factory=dict)
    total_params: dict[str, int] = field(default_factory=dict)
    active_params: dict[str, float | None] = field(default_factory=dict)

    @property
    def modalities(self) -> list[str]:
        """What losses were measured for, the mean over all tokens last."""
        found = self.histories[self.names[0]][0].held_out
        return [*(name for name in found if name != ALL), ALL]

    def shares(self, name: str, modality: str) -> list[float]:
        """Share of the baseline's steps that ``name`` needs, one a seed; seeds without a shared loss are left out."""
        found = []
        for base, other in zip(self.histories[self.names[0]], self.histories[name], strict=True):
            share = step_match(base.steps, base.held_out[modality], other.steps, other.held_out[modality])
            if share is not None:
                found.append(share)
        return found

    def rows(self) -> list[dict[str, Any]]:
        """One row a model: sizes, FLOPs, final losses, shares and time, each with mean and spread over seeds."""
        base = self.names[0]
        rows = []
        for name in self.names:
            runs = self.histories[name]
            seconds = statistics.mean(run.seconds for run in runs)
            row: dict[str, Any] = {
                "model": name,
                "total_params": self.total_params[name],
                "active_params": self.active_params[name],
                "flops_per_token": self.forward_flops[name],
                "flops_ratio": _ratio(self.forward_flops[name], self.forward_flops[base]),
                "seconds": seconds,
                "time_ratio": seconds / statistics.mean(run.seconds for run in self.histories[base]),
                "loss": {},
                "share": {},
            }
            for modality in self.modalities:
                row["loss"][modality] = _spread([run.held_out[modality][-1] for run in runs])
                row["share"][modality] = _spread(self.shares(name, modality)) if name != base else None
            rows.append(row)
        return rows

    def to_dict(self) -> dict[str, Any]:
        """Plain values: the rows, the settings and every curve."""
        return {
            "environment": self.environment,
            "baseline": self.names[0],
            "seeds": self.seeds,
            "settings": self.settings.to_dict(),
            "rows": self.rows(),
            "histories": {name: [run.to_dict() for run in runs] for name, runs in self.histories.items()},
        }

    def save(self, folder: Path | str) -> Path:
        """Writes ``comparison.json`` and ``curves.png`` into a folder."""
        from omnimoe.plots import draw_curves

        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "comparison.json").write_text(json.dumps(self.to_dict(), indent=1) + "\n")
        draw_curves(self, folder / "curves.png")
        return folder


def _spread(values: list[float]) -> dict[str, float] | None:
    if not values:
        return None
    spread = statistics.stdev(values) if len(values) > 1 else 0.0
    return {"mean": statistics.mean(values), "std": spread, "min": min(values), "max": max(values), "n": len(values)}


def resolve_names(names: Sequence[str], size: str) -> list[str]:
    """Zoo names of what a user typed: ``"mot"`` and ``"nano"`` give ``"mot_nano"``; a full name stays as it is."""
    return [f"{name}_{size}" if name not in MODELS and f"{name}_{size}" in MODELS else name for name in names]


def compare(
    names: Sequence[str],
    settings: TrainSettings,
    *,
    seeds: Sequence[int] = (0,),
    corpus: Corpus | None = None,
    out: Path | str | None = None,
    device: str | torch.device = "cpu",
    show_progress: bool = True,
    on_model: Callable[[str, int, Training], None] | None = None,
) -> Comparison:
    """Trains each model with each seed on the same batches in the same order.

    Args:
        names: zoo names; the first is the baseline, usually the dense model.
        settings: of every run, but for the seed.
        seeds: seeds of weights and data order.
        corpus: on what; loaded by ``settings.data`` where None.
        out: folder; every run's log and checkpoint go into a subfolder, tables and curves into the folder itself.
        device: where to train.
        show_progress: draw bars on a terminal.
        on_model: called with the name, the seed and the finished run.

    Returns:
        The comparison.

    Raises:
        ValueError: before anything is trained, if there are fewer than two models or no seed, a model is unknown, the
            models do not share one vocabulary, or the settings give too few evaluations to compare.
        KeyboardInterrupt: if Ctrl-C ended a run; its checkpoint is kept.
    """
    if len(names) < 2 or len(set(names)) != len(names):
        raise ValueError(f"a comparison needs at least two different models, got {list(names)}")
    if not seeds:
        raise ValueError("a comparison needs at least one seed")
    _check_settings(settings)
    _check_models(names)
    corpus = Corpus.load(settings.data) if corpus is None else corpus
    comparison = Comparison(names=list(names), seeds=list(seeds), settings=settings)
    comparison.environment = {
        "date": time.strftime("%Y-%m-%d"),
        "omnimoe": omnimoe.__version__,
        "torch": torch.__version__,
        "device": str(device),
        "corpus": f"{corpus.name} {corpus.meta['rows_sha256'][:12]}",
    }
    for name in names:
        info = model_info(name)
        comparison.total_params[name] = info.total_params
        comparison.active_params[name] = info.active_params
    for seed in seeds:
        for name in names:
            run = settings.replace(seed=seed)
            model = load(name, seed=seed).to(device)
            folder = None if out is None else Path(out) / "runs" / f"{name}-seed{seed}"
            label = name if len(seeds) == 1 else f"{name} seed {seed}"
            training = Training(model, run, corpus=corpus, out=folder, name=label, show_progress=show_progress)
            if name not in comparison.forward_flops:
                comparison.forward_flops[name] = _forward_flops(model, training.held_out[0])
                _check_flops(comparison, name)
            history = training.run()
            if training.was_interrupted:
                raise KeyboardInterrupt
            comparison.histories.setdefault(name, []).append(history)
            if on_model is not None:
                on_model(name, seed, training)
    if out is not None:
        comparison.save(out)
    return comparison


def _check_flops(comparison: Comparison, name: str) -> None:
    base = comparison.names[0]
    ratio = _ratio(comparison.forward_flops[name], comparison.forward_flops[base])
    if ratio is not None and abs(ratio - 1) > _EQUAL:
        logger.warning(
            "%s costs %.2f times the FLOPs of %s a token, so a share of its steps is not that share of its FLOPs",
            name,
            ratio,
            base,
        )


def _forward_flops(model: OmniMoeForCausalLM, batch: dict[str, torch.Tensor]) -> float | None:
    try:
        return flops(model, batch).per_token
    except UnknownCostError as error:
        logger.warning("%s", error)
        return None


def _ratio(number: float | None, base: float | None) -> float | None:
    return None if number is None or base is None else number / base


def _check_settings(settings: TrainSettings) -> None:
    count = math.ceil(settings.steps / settings.evaluate_every) if settings.evaluate_every else 1
    if count < 2 or not settings.evaluate_batches:
        raise ValueError(
            f"curves are compared at two evaluations or more, but {settings.steps} steps with evaluate_every "
            f"{settings.evaluate_every} and evaluate_batches {settings.evaluate_batches} give "
            f"{count if settings.evaluate_batches else 0}; evaluate more often or train longer"
        )


def _check_models(names: Sequence[str]) -> None:
    configs = {name: MODELS.get(name)() for name in names}
    base = configs[names[0]]
    for name, config in configs.items():
        if config.token_ranges != base.token_ranges:
            raise ValueError(
                f"{name} has another vocabulary than {names[0]}, {_ranges(config)} and not {_ranges(base)}; "
                "losses are compared over the same tokens"
            )
        if not config.is_causal:
            logger.warning(
                "%s looks at later tokens when it scores (mask %r, or a router that chooses among rows), so its loss "
                "is lower than what it could generate with; do not read it against that of a causal model",
                name,
                config.mask,
            )


def _ranges(config: OmniMoeConfig) -> str:
    return ", ".join(f"{name} {held.start}-{held.stop - 1}" for name, held in config.token_ranges.items())

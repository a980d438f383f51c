"""Architectures side by side: trained on equal data, compared by the share of the baseline's steps they need.

A model whose routers choose among rows has two losses: one in the form it is trained in, which looks at later tokens,
and one in which every token is routed by itself, as in generation. The two never stand in one row.
"""

from __future__ import annotations

import json
import logging
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from omnimoe.compare.plan import baselines_of
from omnimoe.compare.runs import Run, claimed, train_run
from omnimoe.compare.step_match import spread, step_match
from omnimoe.data import Corpus
from omnimoe.model import MODELS, OmniMoeConfig
from omnimoe.train import History, Training, TrainSettings

ALL = "all"
CAUSAL, LOOKS_AHEAD = "causal", "looks ahead"
"""How a loss was scored: every token by earlier ones alone, or with routers that choose among later ones too."""

_EQUAL = 0.02
"""Models whose FLOPs differ by no more than this share count as equal; routers cost that little."""

logger = logging.getLogger(__name__)


@dataclass(kw_only=True)
class Comparison:
    """What :func:`compare` measured.

    Args:
        names: models in the order given.
        seeds: seeds that each is trained with.
        settings: of every run, but for the seed.
        baselines: model to the one that it is measured in the steps of, where that is not the first of ``names``.
        histories: model to seed to history; runs that are not finished are not there.
        environment: date, versions and the revision of the corpus.
        is_causal: model to whether it looks at no later token; one that is not named does not.
        forward_flops: model to forward FLOPs of a token of the training mix; None where a part does not state its cost.
        total_params: model to parameters stored.
        active_params: model to parameters a token meets, the mean over modalities; None where unknown.
    """

    names: list[str]
    seeds: list[int]
    settings: TrainSettings
    baselines: dict[str, str] = field(default_factory=dict)
    histories: dict[str, dict[int, History]] = field(default_factory=dict)
    environment: dict[str, str] = field(default_factory=dict)
    is_causal: dict[str, bool] = field(default_factory=dict)
    forward_flops: dict[str, float | None] = field(default_factory=dict)
    total_params: dict[str, int] = field(default_factory=dict)
    active_params: dict[str, float | None] = field(default_factory=dict)

    def add(self, run: Run) -> None:
        """Takes in a finished run."""
        name = run.model
        self.histories.setdefault(name, {})[run.settings.seed] = run.history
        self.environment = self.environment or run.environment
        self.is_causal[name], self.forward_flops[name] = run.is_causal, run.forward_flops
        self.total_params[name], self.active_params[name] = run.total_params, run.active_params

    @property
    def modalities(self) -> list[str]:
        """What losses were measured for, the mean over all tokens last."""
        found = next(iter(next(held for held in self.histories.values() if held).values())).held_out
        return [*(name for name in found if name != ALL), ALL]

    def baseline_of(self, name: str) -> str:
        """The model that ``name`` is measured in the steps of; itself for a baseline."""
        return self.baselines.get(name, self.names[0])

    def forms(self, name: str) -> list[str]:
        """How the losses of a model were scored."""
        if self.is_causal.get(name, True):
            return [CAUSAL]
        has_causal = all(history.causal for history in self.histories[name].values())
        return [LOOKS_AHEAD, CAUSAL] if has_causal else [LOOKS_AHEAD]

    def losses(self, name: str, seed: int, form: str) -> dict[str, list[float]]:
        """Held-out losses of a run by modality, scored as ``form`` says."""
        history = self.histories[name][seed]
        return history.causal if form == CAUSAL and not self.is_causal.get(name, True) else history.held_out

    def shares(self, name: str, modality: str, form: str = CAUSAL) -> dict[int, float]:
        """Share of the baseline's steps that ``name`` needs, by seed; seeds without a shared loss are left out.

        Args:
            name: the model.
            modality: of the losses.
            form: how those of ``name`` were scored. The baseline's are causal where it has such.
        """
        base, found = self.baseline_of(name), {}
        for seed, other in self.histories[name].items():
            if seed not in self.histories.get(base, {}):
                continue
            mine, theirs = self.losses(name, seed, form), self.losses(base, seed, self.forms(base)[-1])
            share = step_match(self.histories[base][seed].steps, theirs[modality], other.steps, mine[modality])
            if share is not None:
                found[seed] = share
        return found

    def gaps(self, name: str, modality: str, form: str = CAUSAL) -> list[float]:
        """Final loss of ``name`` less that of its baseline, one a seed, which both share with its order of data."""
        base, runs = self.baseline_of(name), self.histories.get(self.baseline_of(name), {})
        theirs = self.forms(base)[-1] if runs else form
        return [
            self.losses(name, seed, form)[modality][-1] - self.losses(base, seed, theirs)[modality][-1]
            for seed in self.histories[name]
            if seed in runs
        ]

    def rows(self) -> list[dict[str, Any]]:
        """One row a model and form: sizes, FLOPs, final losses, what they are less the baseline's, shares and time.

        Of losses, gaps and shares it is mean and spread over seeds. Models without a finished run are left out.
        """
        rows = []
        for name in self.names:
            runs, base = self.histories.get(name, {}), self.baseline_of(name)
            is_base = name == base
            if not runs:
                continue
            seconds, first = _mean_seconds(runs), _mean_seconds(self.histories.get(base, {}))
            for form in self.forms(name):
                row: dict[str, Any] = {
                    "model": name,
                    "baseline": base,
                    "scored": form,
                    "seeds": sorted(runs),
                    "total_params": self.total_params[name],
                    "active_params": self.active_params[name],
                    "flops_per_token": self.forward_flops[name],
                    "flops_ratio": _ratio(self.forward_flops[name], self.forward_flops.get(base)),
                    "seconds": seconds,
                    "time_ratio": _ratio(seconds, first),
                    "loss": {},
                    "gap": {},
                    "share": {},
                }
                for modality in self.modalities:
                    row["loss"][modality] = spread([self.losses(name, seed, form)[modality][-1] for seed in runs])
                    row["gap"][modality] = None if is_base else spread(self.gaps(name, modality, form))
                    shares = () if is_base else tuple(self.shares(name, modality, form).values())
                    row["share"][modality] = spread(shares)
                rows.append(row)
        return rows

    def to_dict(self) -> dict[str, Any]:
        """Plain values: the rows, the settings and every curve."""
        return {
            "environment": self.environment,
            "baseline": self.names[0],
            "baselines": self.baselines,
            "seeds": self.seeds,
            "settings": self.settings.to_dict(),
            "rows": self.rows(),
            "histories": {
                name: [{"seed": seed, **run.to_dict()} for seed, run in sorted(runs.items())]
                for name, runs in self.histories.items()
            },
        }

    @classmethod
    def from_dict(cls, plain: dict[str, Any]) -> Comparison:
        """What :meth:`to_dict` gave."""
        known = {row["model"]: row for row in plain["rows"]}
        ahead = {row["model"] for row in plain["rows"] if row["scored"] == LOOKS_AHEAD}
        return cls(
            names=list(known),
            seeds=plain["seeds"],
            settings=TrainSettings.from_dict(plain["settings"]),
            baselines=plain["baselines"],
            histories={
                name: {run["seed"]: History(**{key: run[key] for key in run if key != "seed"}) for run in runs}
                for name, runs in plain["histories"].items()
            },
            environment=plain["environment"],
            is_causal={name: name not in ahead for name in known},
            forward_flops={name: row["flops_per_token"] for name, row in known.items()},
            total_params={name: row["total_params"] for name, row in known.items()},
            active_params={name: row["active_params"] for name, row in known.items()},
        )

    def save(self, folder: Path | str) -> Path:
        """Writes ``comparison.json`` and ``curves.png`` into a folder."""
        from omnimoe.plots import draw_curves

        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "comparison.json").write_text(json.dumps(self.to_dict(), indent=1) + "\n")
        draw_curves(self, folder / "curves.png")
        return folder


def _mean_seconds(runs: Mapping[int, History]) -> float | None:
    return statistics.mean(run.seconds for run in runs.values()) if runs else None


def _ratio(number: float | None, base: float | None) -> float | None:
    return None if number is None or base is None else number / base


def compare(
    names: Sequence[str],
    settings: TrainSettings,
    *,
    seeds: Sequence[int] = (0,),
    corpus: Corpus | None = None,
    out: Path | str | None = None,
    resume: bool = False,
    device: str | torch.device = "cpu",
    show_progress: bool = True,
    on_model: Callable[[str, int, Training], None] | None = None,
) -> Comparison:
    """Trains each model with each seed on the same batches in the same order.

    Args:
        names: zoo names; the first is the baseline, usually the dense model. A mixture of state spaces is measured
            in the steps of its dense form, where that is among them.
        settings: of every run, but for the seed.
        seeds: seeds of weights and data order.
        corpus: on what; loaded by ``settings.data`` where None.
        out: folder; every run's log and checkpoint go into a subfolder, tables and curves into the folder itself.
        resume: read the finished runs of ``out`` and take up broken ones. Several processes may share the work so:
            a run that another one trains is left to it, and waited for at the end.
        device: where to train.
        show_progress: draw bars on a terminal.
        on_model: called with the name, the seed and the finished run, of runs that were trained here.

    Returns:
        The comparison.

    Raises:
        ValueError: before anything is trained, if there are fewer than two models or no seed, a model is unknown, the
            models do not share one vocabulary, or the settings give too few evaluations to compare.
        RunError: if ``resume`` finds a run with other settings or of a model that was declared otherwise.
        KeyboardInterrupt: if Ctrl-C ended a run; its checkpoint is kept.
    """
    if len(names) < 2 or len(set(names)) != len(names):
        raise ValueError(f"a comparison needs at least two different models, got {list(names)}")
    if not seeds:
        raise ValueError("a comparison needs at least one seed")
    if resume and out is None:
        raise ValueError("without out= there is nothing to resume; name the folder of the comparison")
    _check_settings(settings)
    _check_models(names)
    corpus = Corpus.load(settings.data) if corpus is None else corpus
    comparison = Comparison(names=list(names), seeds=list(seeds), settings=settings, baselines=baselines_of(names))
    left = [(name, seed) for seed in seeds for name in names]
    for is_last in (False, True):
        pending, left = left, []
        for name, seed in pending:
            folder = None if out is None else Path(out) / "runs" / f"{name}-seed{seed}"
            with _held(folder, wait=is_last or not resume) as is_held:
                if not is_held:
                    left.append((name, seed))
                    continue
                run = train_run(
                    name,
                    settings.replace(seed=seed),
                    corpus=corpus,
                    folder=folder,
                    resume=resume,
                    device=device,
                    label=name if len(seeds) == 1 else f"{name} seed {seed}",
                    show_progress=show_progress,
                    on_trained=_told(on_model, name, seed),
                )
            is_first = name not in comparison.histories
            comparison.add(run)
            if is_first:
                _check_flops(comparison, name)
    if out is not None:
        comparison.save(out)
    return comparison


def _held(folder: Path | None, *, wait: bool) -> AbstractContextManager[bool]:
    return nullcontext(True) if folder is None else claimed(folder, wait=wait)


def _told(on_model: Callable[[str, int, Training], None] | None, name: str, seed: int):
    return None if on_model is None else lambda training: on_model(name, seed, training)


def _check_flops(comparison: Comparison, name: str) -> None:
    base = comparison.baseline_of(name)
    cost = comparison.forward_flops[name]
    if cost is None:
        logger.warning("what %s costs a token is unknown, so a share of its steps says nothing of its FLOPs", name)
    ratio = _ratio(cost, comparison.forward_flops.get(base))
    if ratio is not None and abs(ratio - 1) > _EQUAL:
        logger.warning(
            "%s costs %.2f times the FLOPs of %s a token, so a share of its steps is not that share of its FLOPs",
            name,
            ratio,
            base,
        )


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
                "%s looks at later tokens when it scores (mask %r, or a router that chooses among rows), so that loss "
                "is lower than what it could generate with; it has a row of its own, beside the causal form's",
                name,
                config.mask,
            )


def _ranges(config: OmniMoeConfig) -> str:
    return ", ".join(f"{name} {held.start}-{held.stop - 1}" for name, held in config.token_ranges.items())

"""Several models, several metrics: one evaluation, as a table, as JSON and as a page."""

from __future__ import annotations

import dataclasses
import functools
import json
import logging
import os
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

import omnimoe
from omnimoe.data import Corpus
from omnimoe.evaluate.base import METRICS, RESERVED, EvaluationError, Measure, NotRunError, metric_names, title_of
from omnimoe.evaluate.bench import SAMPLING, Bench
from omnimoe.evaluate.raw import RawCorpus
from omnimoe.flops import total_params
from omnimoe.generation.sampling import Sampling
from omnimoe.inputs import check_whole
from omnimoe.model import OmniMoeForCausalLM
from omnimoe.tokenizers import Tokenizer

logger = logging.getLogger(__name__)


@dataclass(kw_only=True)
class Evaluation:
    """What :func:`evaluate` measured.

    Args:
        models: label to number of parameters stored.
        settings: what was asked for, as plain values.
        environment: date, versions, device and the revision of the corpus.
        measures: metric to its measures.
        not_run: metric to the reason why it did not run.
        notes: metric to what the reader must know.
        seconds: metric to the time it took.
        sheets: metric to file and caption of each contact sheet.
        sounds: metric to file and caption of each clip.
    """

    models: dict[str, int]
    settings: dict[str, Any]
    environment: dict[str, str]
    measures: dict[str, list[Measure]] = field(default_factory=dict)
    not_run: dict[str, str] = field(default_factory=dict)
    notes: dict[str, list[str]] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    sheets: dict[str, list[tuple[Path, str]]] = field(default_factory=dict)
    sounds: dict[str, list[tuple[Path, str]]] = field(default_factory=dict)

    def find(self, metric: str, name: str, of: str, unit: str | None = None) -> Measure:
        """One measure.

        Raises:
            KeyError: if there is none.
        """
        for measure in self.measures.get(metric, []):
            if (measure.name, measure.of) == (name, of) and unit in (None, measure.unit):
                return measure
        raise KeyError(f"no measure {name!r} of {of!r} in {metric!r}")

    def columns(self, metric: str) -> list[str]:
        """Whose measures a metric has: the models in their order, then what they are held against."""
        found = dict.fromkeys(measure.of for measure in self.measures[metric])
        return [name for name in self.models if name in found] + [name for name in found if name not in self.models]

    def rows(self, metric: str, *, detail: bool = True) -> list[tuple[str, str, dict[str, Measure]]]:
        """The measures of a metric as rows of name, unit, and column to measure.

        Args:
            metric: a metric that ran.
            detail: whether measures that only the report shows come too.
        """
        table: dict[tuple[str, str], dict[str, Measure]] = {}
        for measure in self.measures[metric]:
            if detail or not measure.detail:
                table.setdefault((measure.name, measure.unit), {})[measure.of] = measure
        return [(name, unit, held) for (name, unit), held in table.items()]

    def to_dict(self) -> dict[str, Any]:
        """Plain values; files by name."""
        return {
            "environment": self.environment,
            "settings": self.settings,
            "models": self.models,
            "metrics": {
                name: {
                    "title": title_of(name),
                    "seconds": round(self.seconds[name], 1),
                    "notes": self.notes[name],
                    "measures": [measure.to_dict() for measure in measures],
                    "files": [path.name for path, _ in (*self.sheets[name], *self.sounds[name])],
                }
                for name, measures in self.measures.items()
            },
            "not_run": self.not_run,
        }

    def save(self, folder: str | os.PathLike[str]) -> Path:
        """Writes ``eval.json`` and ``report.html`` into a folder.

        Returns:
            The folder.
        """
        from omnimoe.evaluate.tables import write_report

        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "eval.json").write_text(json.dumps(self.to_dict(), indent=1) + "\n", encoding="utf-8")
        write_report(self, folder / "report.html")
        return folder


def evaluate(
    models: Mapping[str, OmniMoeForCausalLM],
    *,
    corpus: Corpus | str = "p",
    split: str = "test",
    metrics: Iterable[str] | None = None,
    raw: str | os.PathLike[str] | None = None,
    num: int | None = 100,
    candidates: Sequence[int] = (4, 10),
    seed: int = 0,
    out: str | os.PathLike[str] | None = None,
    tokenizers: Mapping[str, Tokenizer] | None = None,
    sampling: Mapping[str, Mapping[str, Any]] | None = None,
    saved_sampling: bool = False,
    batch_size: int = 16,
    show_progress: bool = False,
) -> Evaluation:
    """Measures models on held-out data, all on the same concepts.

    Args:
        models: label to model; put a model beside its dense twin. Their training mode is put back as it was.
        corpus: a corpus or its name or folder.
        split: ``"val"``, ``"test"``, ``"drawing"`` or ``"train"``.
        metrics: names of registered metrics; None for all.
        raw: the folder the corpus was made from; without it, what tokens decode to stands for pictures and clips.
        num: most concepts that a metric uses, which bounds its cost; None for all.
        candidates: sizes of the sets in which the right one is to be found, each at least 2.
        seed: draws concepts, candidates and samples; the same seed and ``num`` repeat a run.
        out: folder for tables, contact sheets and the report; None writes nothing.
        tokenizers: modality to tokenizer, where they are not those that ship with the package.
        sampling: options of ``omnimoe.generate.generate`` by modality: ``{"image": {"temperature": 1.0}}``.
        saved_sampling: for the rest, sample each model as it was saved to be (``omnimoe.generate.set_sampling``);
            otherwise all models alike.
        batch_size: sequences, pictures or clips at once.
        show_progress: draw bars on a terminal.

    Returns:
        The evaluation. A metric that cannot run here is in ``not_run``, with the reason.

    Raises:
        EvaluationError: if there is no model, or an option is out of range.
        GenerationError: if a choice of sampling is.
        RegistryError: if a metric is unknown; the message names the nearest.
        CorpusError: if there is no such corpus, split or raw folder.
        DataMismatchError: if the corpus does not fit a model.
    """
    wanted = metric_names() if metrics is None else list(dict.fromkeys(metrics))
    _check(models, wanted, num, candidates, batch_size)
    _check_sampling(models, sampling or {})
    corpus = Corpus.load(corpus) if isinstance(corpus, str) else corpus
    folder = None if out is None else Path(out)
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
    device = next(next(iter(models.values())).parameters()).device
    shared = functools.partial(
        Bench,
        models=models,
        corpus=corpus,
        split=split,
        raw=None if raw is None else RawCorpus(raw, corpus),
        num=num,
        candidates=tuple(sorted(set(candidates))),
        seed=seed,
        batch_size=batch_size,
        out=folder,
        tokenizers=tokenizers or {},
        sampling=sampling or {},
        saved_sampling=saved_sampling,
        device=device,
        show_progress=show_progress,
        loaded={},
    )
    evaluation = Evaluation(
        models={name: total_params(model.config) for name, model in models.items()},
        settings={
            "split": split,
            "metrics": wanted,
            "raw": raw is not None,
            "num": num,
            "candidates": sorted(set(candidates)),
            "seed": seed,
            "batch_size": batch_size,
            "dtype": {name: str(model.dtype).removeprefix("torch.") for name, model in models.items()},
            **_sampling(models, sampling or {}, saved_sampling),
        },
        environment={
            "date": time.strftime("%Y-%m-%d"),
            "omnimoe": omnimoe.__version__,
            "torch": torch.__version__,
            "device": str(device),
            "corpus": f"{corpus.name} {corpus.meta['rows_sha256'][:12]}",
        },
    )
    modes = {name: model.training for name, model in models.items()}
    try:
        for model in models.values():
            model.eval()
            shared().modalities(model)
        for name in wanted:
            _run(name, shared(), evaluation)
    finally:
        for name, model in models.items():
            model.train(modes[name])
    if folder is not None:
        evaluation.save(folder)
    return evaluation


def _sampling(
    models: Mapping[str, OmniMoeForCausalLM], asked: Mapping[str, Mapping[str, Any]], is_saved: bool
) -> dict[str, Any]:
    """What is kept of how models were sampled: one choice for all, or what was asked for and what each brought."""
    if not is_saved:
        return {"sampling": {to: {**given, **asked.get(to, {})} for to, given in SAMPLING.items()}}
    own = {label: getattr(model.generation_config, "sampling", None) or {} for label, model in models.items()}
    return {"sampling": dict(asked), "saved_sampling": own}


def _run(name: str, bench: Bench, evaluation: Evaluation) -> None:
    started = time.perf_counter()
    try:
        found = list(METRICS.get(name)(bench))
    except (NotRunError, EvaluationError) as error:
        logger.warning("%s was not run: %s", name, error)
        evaluation.not_run[name] = str(error)
        return
    evaluation.measures[name] = found
    evaluation.notes[name] = bench.notes
    evaluation.sheets[name], evaluation.sounds[name] = bench.sheets, bench.sounds
    evaluation.seconds[name] = time.perf_counter() - started


def _check(
    models: Mapping[str, OmniMoeForCausalLM],
    metrics: Sequence[str],
    num: int | None,
    candidates: Sequence[int],
    batch_size: int,
) -> None:
    taken = sorted(set(models) & set(RESERVED))
    if taken:
        raise EvaluationError(f"{taken[0]!r} is the column of what models are held against; label the model otherwise")
    if not models:
        raise EvaluationError("there is no model to evaluate; pass {label: model}")
    for name in metrics:
        METRICS.get(name)
    if num is not None and num < 3:
        raise EvaluationError(f"num must be at least 3 concepts, or None for all, got {num}")
    if not candidates or min(candidates) < 2:
        raise EvaluationError(f"candidates must be sizes of at least 2, got {tuple(candidates)}")
    check_whole("batch_size", batch_size, error=EvaluationError)


def _check_sampling(models: Mapping[str, OmniMoeForCausalLM], sampling: Mapping[str, Mapping[str, Any]]) -> None:
    """Refuses options out of range before anything is measured."""
    choices = {field.name for field in dataclasses.fields(Sampling)}
    for to, options in sampling.items():
        check_whole(f"best_of of {to}", options.get("best_of", 1), error=EvaluationError)
        named = {what: {to: value} for what, value in options.items() if what in choices}
        for model in models.values():
            if to in model.config.modality_names:
                Sampling.usual(model, **named)

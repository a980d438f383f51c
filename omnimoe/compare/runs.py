"""Runs that are kept: finished ones are read again, broken ones are taken up, and no two processes train the same.

A run is a folder. ``run.json`` is written when it is finished, whole or not at all; up to then the folder holds what
:class:`omnimoe.train.Training` keeps in it. Whoever trains it holds a lock on it that ends with the process.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import omnimoe
from omnimoe.data import Corpus
from omnimoe.flops import UnknownCostError, flops
from omnimoe.hub import load, model_info
from omnimoe.model import MODELS, OmniMoeConfig
from omnimoe.train import History, Training, TrainSettings
from omnimoe.train.data import held_out_batches

try:
    import fcntl
except ImportError:  # Windows: without locks, two processes may train the same run, and the later one is kept
    fcntl = None  # type: ignore[assignment]

RUN_FILE = "run.json"
_LOCK_FILE = "lock"


class RunError(ValueError):
    """A kept run that is not the one asked for, or is no run."""


@dataclass(frozen=True, kw_only=True)
class Run:
    """A finished run of one model with one seed.

    Args:
        model: its zoo name.
        settings: the seed among them.
        history: what was measured.
        config: the model's, by which a run of a model that was declared otherwise since is told.
        is_causal: whether the model looks at no later token; otherwise ``history.held_out`` is of a model that does.
        forward_flops: FLOPs of a token of the held-out mix; None where a part does not state its cost.
        total_params: weights stored.
        active_params: weights that a token meets, the mean over modalities; None where unknown.
        environment: date, versions, device and corpus.
    """

    model: str
    settings: TrainSettings
    history: History
    config: dict[str, Any]
    is_causal: bool
    forward_flops: float | None
    total_params: int
    active_params: float | None
    environment: dict[str, str]

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        return {**vars(self), "settings": self.settings.to_dict(), "history": self.history.to_dict()}

    @classmethod
    def from_dict(cls, plain: dict[str, Any]) -> Run:
        """What :meth:`to_dict` gave."""
        settings, history = TrainSettings.from_dict(plain["settings"]), History(**plain["history"])
        return cls(**{**plain, "settings": settings, "history": history})

    def save(self, folder: Path) -> None:
        """Writes ``run.json``, whole or not at all."""
        folder.mkdir(parents=True, exist_ok=True)
        fresh = folder / f"{RUN_FILE}.new"
        fresh.write_text(json.dumps(self.to_dict()) + "\n")
        os.replace(fresh, folder / RUN_FILE)

    @classmethod
    def load(cls, folder: Path) -> Run | None:
        """The finished run of a folder; None where it is not finished.

        Raises:
            RunError: if its file is no run.
        """
        path = folder / RUN_FILE
        if not path.is_file():
            return None
        try:
            return cls.from_dict(json.loads(path.read_text()))
        except (TypeError, ValueError, KeyError) as error:
            raise RunError(f"{path} is no finished run ({error}); remove {folder} to train it anew") from error


@contextmanager
def claimed(folder: Path, *, wait: bool = False) -> Iterator[bool]:
    """Holds a run against other processes, until the end or the death of this one.

    Args:
        folder: of the run; made where it is not there.
        wait: for whoever holds it.

    Yields:
        Whether it is held; always True where the system has no locks.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if fcntl is None:
        yield True
        return
    with (folder / _LOCK_FILE).open("w") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            yield False
            return
        yield True


def train_run(
    name: str,
    settings: TrainSettings,
    *,
    corpus: Corpus,
    folder: Path | None = None,
    resume: bool = False,
    keep_weights: bool = True,
    device: str | torch.device = "cpu",
    label: str = "",
    show_progress: bool = True,
    on_trained: Callable[[Training], None] | None = None,
) -> Run:
    """Trains a model of the zoo, evaluated causally too where it looks ahead.

    Args:
        name: zoo name.
        settings: how; its seed is that of weights and data order.
        corpus: on what.
        folder: where the run is kept; None keeps nothing.
        resume: read a finished run of the folder instead of training, and take up one that was broken off.
        keep_weights: leave the last checkpoint when the run is finished.
        device: where to train.
        label: beside the progress bar.
        show_progress: draw a bar on a terminal.
        on_trained: called with the run if it was trained here.

    Returns:
        The run.

    Raises:
        RunError: if the folder's run has other settings or is of a model that was declared otherwise.
        KeyboardInterrupt: if Ctrl-C ended it; its checkpoint is kept.
    """
    settings, config = settings.replace(evaluate_causally=True), MODELS.get(name)()
    if folder is not None and resume:
        kept = Run.load(folder)
        if kept is not None:
            _check_same(kept, name, settings, config, folder)
            return kept
    elif folder is not None:
        (folder / RUN_FILE).unlink(missing_ok=True)
    model = load(name, seed=settings.seed).to(device)
    training = Training(model, settings, corpus=corpus, out=folder, name=label or name, show_progress=show_progress)
    if resume and training.checkpoint_folder is not None and training.checkpoint_folder.is_dir():
        training.resume()
    history = training.run()
    if training.was_interrupted:
        raise KeyboardInterrupt
    info = model_info(name)
    run = Run(
        model=name,
        settings=settings,
        history=history,
        config=config.declaration(),
        is_causal=config.is_causal,
        forward_flops=flops_of(config, settings, corpus),
        total_params=info.total_params,
        active_params=info.active_params,
        environment=environment(corpus, device),
    )
    if folder is not None:
        run.save(folder)
        if not keep_weights:
            for path in folder.glob("checkpoint*"):
                shutil.rmtree(path)
    if on_trained is not None:
        on_trained(training)
    return run


def flops_of(config: OmniMoeConfig, settings: TrainSettings, corpus: Corpus) -> float | None:
    """Forward FLOPs of a token of the held-out mix; None where a part does not state its cost."""
    try:
        return flops(config, held_out_batches(config, settings, corpus)[0]).per_token
    except UnknownCostError:
        return None


def environment(corpus: Corpus, device: str | torch.device) -> dict[str, str]:
    """Date, versions and the revision of the corpus."""
    return {
        "date": time.strftime("%Y-%m-%d"),
        "omnimoe": omnimoe.__version__,
        "torch": torch.__version__,
        "device": str(device),
        "threads": str(torch.get_num_threads()),
        "corpus": f"{corpus.name} {corpus.meta['rows_sha256'][:12]}",
    }


def _check_same(kept: Run, name: str, settings: TrainSettings, config: OmniMoeConfig, folder: Path) -> None:
    was, now = kept.settings.to_dict(), settings.to_dict()
    changed = [f"{key} was {was.get(key)!r} and is {now[key]!r}" for key in now if was.get(key) != now[key]]
    if kept.model != name:
        changed = [f"it is of {kept.model}, not of {name}"]
    # read again, so that a config from before a field was there has its default
    elif OmniMoeConfig.from_dict(kept.config).declaration() != config.declaration():
        changed.append(f"{name} is declared otherwise since")
    if changed:
        raise RunError(f"{folder} holds another run: {', '.join(changed)}; take another folder, or remove it")

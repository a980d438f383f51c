"""Checkpoints of a run: a model folder that ``from_pretrained`` reads, and beside it what resuming needs.

A checkpoint is written into a sibling folder and renamed when it is whole, so that an interrupted save leaves the last
good one: in place, or, if the break came between two renames, beside it, from where it is put back.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers.utils import logging as hf_logging

from omnimoe.model import OmniMoeForCausalLM
from omnimoe.train.settings import TrainSettings

STATE_FILE = "training_state.pt"
SETTINGS_FILE = "training.json"


class ResumeError(ValueError):
    """A checkpoint that is missing, incomplete, or of another run."""


def save_checkpoint(
    folder: Path, model: OmniMoeForCausalLM, settings: TrainSettings, state: dict[str, Any] | None
) -> Path:
    """Writes a checkpoint in place of whatever ``folder`` held.

    Args:
        folder: where it is published.
        model: the model.
        settings: of the run.
        state: what resuming needs; None for a model without it.

    Returns:
        ``folder``.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    fresh, old = _siblings(folder)
    restore(folder)
    for left in (fresh, old):
        shutil.rmtree(left, ignore_errors=True)
    with quiet():
        model.save_pretrained(fresh)
    (fresh / SETTINGS_FILE).write_text(json.dumps(settings.to_dict(), indent=2) + "\n")
    if state is not None:
        torch.save(state, fresh / STATE_FILE)
    if folder.exists():
        folder.rename(old)
    fresh.rename(folder)
    shutil.rmtree(old, ignore_errors=True)
    return folder


@contextmanager
def quiet() -> Iterator[None]:
    """Keeps transformers from drawing bars for a file, which it does into logs too."""
    was_shown = hf_logging.is_progress_bar_enabled()
    hf_logging.disable_progress_bar()
    try:
        yield
    finally:
        if was_shown:
            hf_logging.enable_progress_bar()


def restore(folder: Path) -> bool:
    """Puts back the last good checkpoint if a save was broken off between its two renames.

    Returns:
        Whether there is a checkpoint now.
    """
    fresh, old = _siblings(folder)
    if not folder.exists() and old.exists():
        # the new one is whole before the old one is moved away
        (fresh if fresh.exists() else old).rename(folder)
    return folder.exists()


def _siblings(folder: Path) -> tuple[Path, Path]:
    return folder.with_name(f".{folder.name}.new"), folder.with_name(f".{folder.name}.old")


def load_state(folder: Path) -> dict[str, Any]:
    """What resuming needs, from a checkpoint; tensors and plain values only, no code is run.

    Raises:
        ResumeError: if there is none.
    """
    restore(folder)
    path = folder / STATE_FILE
    if not path.exists():
        raise ResumeError(f"nothing to resume: {folder} has no {STATE_FILE}; leave resume out to start a run")
    return torch.load(path, map_location="cpu", weights_only=True)


def load_settings(folder: Path) -> TrainSettings:
    """The settings a checkpoint was trained with.

    Raises:
        ResumeError: if there are none.
    """
    path = folder / SETTINGS_FILE
    if not path.exists():
        raise ResumeError(f"no {SETTINGS_FILE} in {folder}: it is no checkpoint of a run, so nothing to resume")
    return TrainSettings.from_dict(json.loads(path.read_text()))

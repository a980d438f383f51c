"""Checkpoints of a run: a model folder that ``from_pretrained`` reads, and beside it what resuming needs.

It is published whole: an interrupted save leaves the last good one or, if all its files were there, is ended by whoever
reads the folder next.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers.utils import logging as hf_logging

from omnimoe.model import OmniMoeForCausalLM
from omnimoe.publish import publish, settle
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
    with publish(folder, replaces=(STATE_FILE, SETTINGS_FILE)) as fresh:
        with quiet():
            model.save_pretrained(fresh)
        (fresh / SETTINGS_FILE).write_text(json.dumps(settings.to_dict(), indent=2) + "\n")
        if state is not None:
            torch.save(state, fresh / STATE_FILE)
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
    """Ends a save that was broken off when its files were whole.

    Returns:
        Whether there is a checkpoint now.
    """
    settle(folder)
    return (folder / SETTINGS_FILE).exists()


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

"""Checkpoints of a run: a model folder that ``from_pretrained`` reads, and beside it what resuming needs.

A checkpoint is written into a sibling folder and renamed when it is whole, so that an interrupted save leaves the last
good one in place.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch

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
    fresh = folder.with_name(f".{folder.name}.{os.getpid()}.new")
    old = folder.with_name(f".{folder.name}.{os.getpid()}.old")
    shutil.rmtree(fresh, ignore_errors=True)
    model.save_pretrained(fresh)
    (fresh / SETTINGS_FILE).write_text(json.dumps(settings.to_dict(), indent=2) + "\n")
    if state is not None:
        torch.save(state, fresh / STATE_FILE)
    if folder.exists():
        folder.rename(old)
    fresh.rename(folder)
    shutil.rmtree(old, ignore_errors=True)
    return folder


def load_state(folder: Path) -> dict[str, Any]:
    """What resuming needs, from a checkpoint; tensors and plain values only, no code is run.

    Raises:
        ResumeError: if there is none.
    """
    path = folder / STATE_FILE
    if not path.exists():
        raise ResumeError(f"no {STATE_FILE} in {folder}: it is no checkpoint of a run, so there is nothing to resume")
    return torch.load(path, map_location="cpu", weights_only=True)


def load_settings(folder: Path) -> TrainSettings:
    """The settings a checkpoint was trained with.

    Raises:
        ResumeError: if there are none.
    """
    path = folder / SETTINGS_FILE
    if not path.exists():
        raise ResumeError(f"no {SETTINGS_FILE} in {folder}: it is no checkpoint of a run")
    return TrainSettings.from_dict(json.loads(path.read_text()))

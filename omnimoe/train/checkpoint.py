"""Checkpoints of a run: a model folder that ``from_pretrained`` reads, and in it what resuming needs.

The newest is always ``checkpoint``; those before it lie beside it under their steps, as in ``checkpoint-000040``. Each
is published whole, kept only if its files are still what was written, and passed by in resuming if they are not.
"""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers.utils import logging as hf_logging

from omnimoe.checkpoint import CheckpointError
from omnimoe.checkpoint.manifest import verify_folder
from omnimoe.hub import from_pretrained
from omnimoe.model import OmniMoeForCausalLM
from omnimoe.publish import MANIFEST, publish, settle
from omnimoe.train.settings import TrainSettings

logger = logging.getLogger(__name__)

STATE_FILE = "training_state.pt"
SETTINGS_FILE = "training.json"


class ResumeError(ValueError):
    """A checkpoint that is missing, damaged, or of another run."""


def save_checkpoint(
    folder: Path, model: OmniMoeForCausalLM, settings: TrainSettings, state: dict[str, Any] | None
) -> Path:
    """Writes a checkpoint in place of the one that ``folder`` held, which is kept beside it under its step.

    Args:
        folder: where it is published.
        model: the model.
        settings: of the run; ``settings.keep`` checkpoints are kept.
        state: what resuming needs; None for a model without it, beside which nothing is kept.

    Returns:
        ``folder``.
    """
    if state is not None:
        _keep_previous(folder, settings.keep, below=state["step"])
    with publish(folder, replaces=(STATE_FILE, SETTINGS_FILE)) as fresh:
        with quiet():
            model.save_pretrained(fresh)
        (fresh / SETTINGS_FILE).write_text(json.dumps(settings.to_dict(), indent=2) + "\n")
        if state is not None:
            torch.save(state, fresh / STATE_FILE)
    if state is not None:
        _prune(folder, settings.keep, below=state["step"])
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
        Whether the run has a checkpoint now.
    """
    return bool(checkpoints(folder))


def checkpoints(folder: Path) -> list[Path]:
    """The checkpoints of a run, newest first, damaged ones too.

    Args:
        folder: where the newest is.
    """
    if folder.is_dir():
        settle(folder)
    newest = [folder] if any((folder / name).is_file() for name in (STATE_FILE, SETTINGS_FILE)) else []
    return newest + [path for _, path in sorted(_older(folder), reverse=True)]


def load_checkpoint(folder: Path) -> tuple[OmniMoeForCausalLM, dict[str, Any]]:
    """The model and the state of a run's newest checkpoint that is whole; what is passed by is said.

    Args:
        folder: where the newest is.

    Returns:
        The model, and what :func:`save_checkpoint` was given as ``state``.

    Raises:
        ResumeError: if there is none, or all are damaged.
    """
    found, refused = checkpoints(folder), []
    for path in found:
        try:
            check_whole(path)
            state = load_state(path)
            with quiet():
                return from_pretrained(path), state
        except (ResumeError, CheckpointError) as error:
            refused.append(str(error))
            logger.warning("passing by a damaged checkpoint: %s", error)
    if refused:
        told = "; ".join(refused)
        raise ResumeError(f"no checkpoint in {folder.parent} is whole: {told}; start anew in another folder")
    raise ResumeError(f"nothing to resume: {folder} has no {STATE_FILE}; leave resume out to start a run")


def check_whole(folder: Path) -> None:
    """Compares every file of a checkpoint with the hash that was written with it, if there is a manifest of them.

    Raises:
        CheckpointError: with the first file that differs.
    """
    if (folder / MANIFEST).exists():
        verify_folder(folder)


def load_state(folder: Path) -> dict[str, Any]:
    """What resuming needs, from a checkpoint; tensors and plain values only, no code is run.

    Raises:
        ResumeError: if there is none, or it cannot be read.
    """
    path = folder / STATE_FILE
    if not path.is_file():
        raise ResumeError(f"nothing to resume: {folder} has no {STATE_FILE}; leave resume out to start a run")
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # what a damaged file raises depends on the place of the damage
        raise ResumeError(f"{path} cannot be read: {str(error).partition(chr(10))[0]}") from error


def load_settings(folder: Path) -> TrainSettings:
    """The settings a checkpoint was trained with; those of the one before it, where they cannot be read.

    Raises:
        ResumeError: if there are none.
    """
    for path in [folder, *checkpoints(folder)]:
        try:
            return TrainSettings.from_dict(json.loads((path / SETTINGS_FILE).read_text()))
        except FileNotFoundError:
            continue
        except (ValueError, OSError) as error:
            logger.warning("passing by %s: %s", path / SETTINGS_FILE, error)
    raise ResumeError(f"no {SETTINGS_FILE} in {folder}: it is no checkpoint of a run, so nothing to resume")


def _older(folder: Path) -> list[tuple[int, Path]]:
    """Kept checkpoints and their steps."""
    pattern = re.compile(re.escape(folder.name) + r"-(\d+)")
    found = [(pattern.fullmatch(path.name), path) for path in folder.parent.glob(f"{folder.name}-*")]
    return [(int(match[1]), path) for match, path in found if match and path.is_dir()]


def _keep_previous(folder: Path, keep: int, *, below: int) -> None:
    """Links the checkpoint that is about to be replaced into a folder of its own, if it is whole and of this run."""
    if keep < 2 or folder not in checkpoints(folder):
        return
    try:
        check_whole(folder)
        step = int(load_state(folder)["step"])
    except (ResumeError, CheckpointError, KeyError) as error:
        logger.warning("a damaged checkpoint is replaced and not kept: %s", error)
        return
    kept = folder.with_name(f"{folder.name}-{step:06d}")
    if step >= below or kept.exists():
        return
    fresh = folder.with_name(f".{kept.name}")
    shutil.rmtree(fresh, ignore_errors=True)
    shutil.copytree(folder, fresh, copy_function=_link)
    fresh.rename(kept)


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target)  # the files are replaced and never written again, so no room is needed twice
    except OSError:
        shutil.copy2(source, target)


def _prune(folder: Path, keep: int, *, below: int) -> None:
    """Drops kept checkpoints beyond ``keep``, and those of steps that this run has not reached: it took another way."""
    older = sorted(_older(folder), reverse=True)
    past = [path for step, path in older if step < below]
    for path in [path for step, path in older if step >= below] + past[keep - 1 :]:
        shutil.rmtree(path)

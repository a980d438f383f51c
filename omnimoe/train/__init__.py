"""Tier 9: training on packed batches.

Names load on first use, so that ``omnimoe train --help``, which needs :class:`TrainSettings` alone, answers at once.
"""

from __future__ import annotations

import importlib
from typing import Any

_PLACES = {
    "DataMismatchError": "data",
    "History": "loop",
    "ResumeError": "checkpoint",
    "TrainSettings": "settings",
    "Training": "loop",
    "TrainingError": "loop",
    "evaluate": "evaluation",
    "held_out_batches": "data",
    "learning_rate": "optim",
    "load_settings": "checkpoint",
    "make_optimizer": "optim",
    "save_checkpoint": "checkpoint",
    "training_batches": "data",
}

__all__ = sorted(_PLACES)  # noqa: PLE0605 - a list of strings, made from the table


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module 'omnimoe.train' has no attribute {name!r}; it has {', '.join(__all__)}")
    value = getattr(importlib.import_module(f"omnimoe.train.{_PLACES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__

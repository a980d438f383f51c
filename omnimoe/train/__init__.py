"""Tier 9: training on packed batches.

Names load on first use, so that ``omnimoe train --help``, which needs :class:`TrainSettings` alone, answers at once.
"""

from __future__ import annotations

from omnimoe.lazy import lazy

__getattr__, __dir__, __all__ = lazy(
    __name__,
    {
        "omnimoe.train.data": ("DataMismatchError", "held_out_batches", "training_batches"),
        "omnimoe.train.errors": ("OutOfMemoryError", "RouterError", "TrainingError"),
        "omnimoe.train.loop": ("History", "Training"),
        "omnimoe.train.memory": ("MemoryEstimate", "estimate_memory"),
        "omnimoe.train.processes": ("joined",),
        "omnimoe.train.checkpoint": ("ResumeError", "load_settings", "save_checkpoint"),
        "omnimoe.train.settings": ("TrainSettings",),
        "omnimoe.train.evaluation": ("evaluate",),
        "omnimoe.train.optim": ("learning_rate", "make_optimizer"),
    },
)

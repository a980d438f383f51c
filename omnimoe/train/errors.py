"""Why a run cannot go on."""

from __future__ import annotations


class TrainingError(RuntimeError):
    """A run that cannot go on."""


class RouterError(TrainingError):
    """A router whose answer is no number."""


class OutOfMemoryError(TrainingError):
    """A step that needs more memory than there is."""

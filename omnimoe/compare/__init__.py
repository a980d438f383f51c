"""Architectures side by side: trained on equal data, compared by the share of the dense model's steps they need."""

from omnimoe.compare.comparison import ALL, CAUSAL, LOOKS_AHEAD, Comparison, compare
from omnimoe.compare.plan import ARCHITECTURES, baselines_of, resolve_names
from omnimoe.compare.runs import Run, RunError, claimed, train_run
from omnimoe.compare.step_match import spread, step_match
from omnimoe.compare.timing import seconds_per_step

__all__ = [
    "ALL",
    "ARCHITECTURES",
    "CAUSAL",
    "LOOKS_AHEAD",
    "Comparison",
    "Run",
    "RunError",
    "baselines_of",
    "claimed",
    "compare",
    "resolve_names",
    "seconds_per_step",
    "spread",
    "step_match",
    "train_run",
]

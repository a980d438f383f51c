"""What a metric is: a function that reads a bench and yields measures; and the table of them."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from omnimoe.registry import Registry

if TYPE_CHECKING:
    from omnimoe.evaluate.bench import Bench

BUILT_IN = ("loss", "retrieval", "tokenizers", "pictures", "speech")
"""Metrics that come with the package, in the order in which they run and are told."""


RESERVED = ("real", "decoded", "original", "round trip", "second round trip")
"""Columns of the built-in metrics that are no model's."""


class EvaluationError(ValueError):
    """A split, a corpus or an option with which nothing can be evaluated."""


class NotRunError(RuntimeError):
    """A metric that cannot run here; the message says what to install or to pass. It is reported as not run."""


@dataclass(frozen=True, kw_only=True)
class Measure:
    """One number of one column.

    Args:
        of: whose it is: the label of a model, or what models are held against, such as ``"real pictures"``.
        name: of the row: ``"text -> image, 1 of 4"``.
        value: the number; NaN and infinity are refused.
        unit: ``"share"`` for 0 to 1, printed in percent; else the unit itself.
        better: ``"lower"`` or ``"higher"``; None where neither is.
        low: lower end of the 95 % interval; None where none is known.
        high: upper end of it.
        chance: what guessing gives, where there is such a thing.
        count: how many trials, tokens, pictures or words it is over.
        detail: leave it out of the terminal's table; the report and ``eval.json`` have all.
    """

    of: str
    name: str
    value: float
    unit: str = ""
    better: str | None = None
    low: float | None = None
    high: float | None = None
    chance: float | None = None
    count: int | None = None
    detail: bool = False

    def __post_init__(self) -> None:
        if self.better not in (None, "lower", "higher"):
            raise ValueError(f"better must be 'lower', 'higher' or None, got {self.better!r}")
        if not abs(self.value) < float("inf"):
            raise ValueError(f"{self.name!r} of {self.of!r} is {self.value}, which is no measure; leave it out")

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


Metric = Callable[["Bench"], Iterable[Measure]]

METRICS: Registry[Metric] = Registry("metric")
register_metric = METRICS.register
"""Decorator that files a function ``(bench) -> measures``; the first line of its docstring is its title."""


def metric_names() -> list[str]:
    """All registered metrics: the built-in ones in their order, then those of users by name."""
    return [*(name for name in BUILT_IN if name in METRICS), *(name for name in METRICS if name not in BUILT_IN)]


def title_of(name: str) -> str:
    """The first line of a metric's docstring, without the full stop; its name where it has none."""
    return (METRICS.get(name).__doc__ or name).strip().partition("\n")[0].rstrip(".")


def _register_built_in() -> None:
    from omnimoe.hub import MODELS

    # plugins are loaded with the zoo, and may bring metrics
    MODELS.names()
    for name in BUILT_IN:
        importlib.import_module(f"omnimoe.evaluate.{name}")


METRICS.on_first_use(_register_built_in)

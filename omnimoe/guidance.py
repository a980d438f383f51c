"""Tier 9: classifier-free guidance by several things to do without, and how its length is kept in bounds."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from numbers import Real

from torch import Tensor

from omnimoe.inputs import InputError

RENORMS = ("none", "global", "channel", "first_channel")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Guidance:
    """How predictions with less of the condition push the one with all of it.

    With the prediction ``v`` and one without something, ``u``, a step makes ``u + scale (v - u)``, one thing after the
    other.

    Args:
        scales: what is left out, the names of modalities or None for the whole condition, and the scale; 1 changes
            nothing and costs nothing.
        interval: times at which it is applied, from above the first to the second.
        renorm: ``"global"`` shrinks a drawn picture, ``"channel"`` a row to the length it had without guidance;
            ``"first_channel"`` does the latter after the first of ``scales``; ``"none"`` leaves it.
        renorm_min: the least factor by which it is shrunk.

    Source: https://arxiv.org/abs/2207.12598; several conditions and an interval as BAGEL has them,
    https://arxiv.org/abs/2505.14683. Where BAGEL drops all guidance when the first scale is 1, the others hold here,
    and its ``"global"`` length is that of each picture, not of the whole batch.
    """

    scales: tuple[tuple[tuple[str, ...] | None, float], ...] = ()
    interval: tuple[float, float] = (0.0, 1.0)
    renorm: str = "none"
    renorm_min: float = 0.0

    def __post_init__(self) -> None:
        for _, scale in self.scales:
            if not isinstance(scale, Real):
                raise InputError(f"guidance must be a number, got {scale!r}")
            if not 0 <= scale < math.inf:
                raise InputError(f"guidance must be 0 or more and finite, got {scale}")
        for names, _ in self.scales:
            if isinstance(names, str):
                raise InputError(f"scales name what is left out in a tuple, got {names!r}; write ({names!r},)")
        low, high = self.interval
        if not low < high:
            raise InputError(f"interval must be (low, high), got {self.interval}")
        if not 0 <= self.renorm_min <= 1:
            raise InputError(f"renorm_min must be in [0, 1], got {self.renorm_min}")
        if self.renorm not in RENORMS:
            raise InputError(f"unknown renorm {self.renorm!r}; known: {', '.join(RENORMS)}")

    @property
    def left_out(self) -> tuple[tuple[str, ...] | None, ...]:
        """What predictions are wanted without."""
        return tuple(names for names, scale in self.scales if scale != 1)

    def holds_at(self, time: float) -> bool:
        """Whether it is applied at a time."""
        low, high = self.interval
        return bool(self.left_out) and low < time <= high

    def combine(self, whole: Tensor, without: Callable[[tuple[str, ...] | None], Tensor], pictures: Tensor) -> Tensor:
        """The prediction that a step follows.

        Args:
            whole: ``(n, C)``, with all of the condition.
            without: gives the prediction without some of it.
            pictures: ``(n,)`` int64, the picture that each row belongs to.
        """
        made = whole
        for place, (names, scale) in enumerate(self.scales):
            if scale != 1:
                less = without(names)
                made = less + scale * (made - less)
            if place == 0 and self.renorm == "first_channel":
                made = self._shrunk(made, whole, None)
        if self.renorm in ("global", "channel"):
            made = self._shrunk(made, whole, pictures if self.renorm == "global" else None)
        return made

    def _shrunk(self, made: Tensor, whole: Tensor, pictures: Tensor | None) -> Tensor:
        lengths = []
        for rows in (whole, made):
            length = rows.float().square().sum(-1, keepdim=True)
            if pictures is not None:
                total = length.new_zeros(int(pictures.max()) + 1, 1).index_add(0, pictures, length)
                length = total[pictures]
            lengths.append(length.sqrt())
        factor = (lengths[0] / (lengths[1] + 1e-8)).clamp(self.renorm_min, 1.0)
        return made * factor.to(made.dtype)


def as_guidance(given: float | Guidance) -> Guidance:
    """A scale alone guides by the begin of document and nothing else."""
    return given if isinstance(given, Guidance) else Guidance(scales=((None, given),))


__all__ = ["RENORMS", "Guidance", "as_guidance"]

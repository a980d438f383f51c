"""Groups of tensors that a published file lacked: what stands in their place is fresh, until somebody trains it."""

from __future__ import annotations

import hashlib

import torch

from omnimoe.convert.converter import Converter
from omnimoe.convert.files import Held, Weights
from omnimoe.convert.rules import Plan
from omnimoe.model import OmniMoeConfig


def remember_start(weights: Held | Weights, plan: Plan, converter: Converter, config: OmniMoeConfig) -> None:
    """Writes into a config what its absent groups start as, for :func:`is_changed`.

    Args:
        weights: of the model.
        plan: of the model.
        converter: of its family.
        config: whose ``published["absent"]`` names the groups.
    """
    absent = converter.absent_groups(config)
    if absent:
        config.published["start"] = {name: _fingerprint(weights, plan, converter, name) for name in absent}


def is_changed(weights: Held | Weights, plan: Plan, converter: Converter, config: OmniMoeConfig, group: str) -> bool:
    """Whether a group has other numbers than it started with; False where the start is not known.

    Args:
        weights: as for :func:`remember_start`, and so the next three.
        plan: see there.
        converter: see there.
        config: see there.
        group: name of the group.
    """
    start = config.published.get("start")
    known = start.get(group) if isinstance(start, dict) else None  # a config is input like any other
    return known is not None and known != _fingerprint(weights, plan, converter, group)


def _fingerprint(weights: Held | Weights, plan: Plan, converter: Converter, group: str) -> str:
    """A short name of a group's numbers, the same where they were cast to bfloat16 meanwhile."""
    names = set(converter.group(group, plan.published))
    found = hashlib.blake2b(digest_size=8)
    for piece in plan.pieces:
        if piece.published in names:
            numbers = weights.read(piece.ours, piece.region).to("cpu", torch.bfloat16).contiguous()
            found.update(numbers.reshape(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()

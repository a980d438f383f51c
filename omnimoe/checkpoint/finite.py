"""Weights that are no numbers: legal in a file, and the end of every answer."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from omnimoe.checkpoint.errors import CheckpointError

logger = logging.getLogger(__name__)
CHOICES = ("warn", "error", "off")


def check_choice(choice: str) -> None:
    """Refuses another word than ``"warn"``, ``"error"`` and ``"off"``."""
    if choice not in CHOICES:
        raise ValueError(f"check_finite must be one of {', '.join(map(repr, CHOICES))}, got {choice!r}")


def check_finite(model: nn.Module, choice: str, source: object) -> None:
    """Looks for NaN and infinity in what was loaded.

    Args:
        model: whose weights are read once; those on the meta device and of dtypes without NaN are passed over.
        choice: ``"warn"`` logs what was found, ``"error"`` raises, ``"off"`` does not look.
        source: where the weights came from, for the message.

    Raises:
        CheckpointError: if any is found and ``choice`` is ``"error"``.
    """
    if choice == "off":
        return
    found = list(_not_finite(model))
    if not found:
        return
    listed = "".join(f"\n  {line}" for line in found[:10])
    more = f"\n  and {len(found) - 10} more" if len(found) > 10 else ""
    message = (
        f"{len(found)} weights of {source} hold NaN or infinity, which spreads to every answer:{listed}{more}\n"
        "save the model again from a step before its loss became NaN"
    )
    if choice == "error":
        raise CheckpointError(f"{message}; check_finite='warn' loads it all the same")
    logger.warning("%s", message)


def _not_finite(model: nn.Module) -> Iterator[str]:
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if not _can_be_read(tensor):
            continue
        least, most = torch.aminmax(tensor.detach())  # NaN goes through both, and no second tensor is made
        if not (least.isfinite() and most.isfinite()):
            count = int((~tensor.detach().isfinite()).sum())
            yield f"{name}: {count} of {tensor.numel()}"


def _can_be_read(tensor: Tensor) -> bool:
    is_plain = type(tensor.data) is Tensor and not tensor.is_meta and tensor.numel() > 0
    return is_plain and tensor.dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16)

"""The compiled kernel for a CPU; its gradient makes the scores again."""

from __future__ import annotations

import torch
from torch import Tensor

from omnimoe.ops._library import call


def attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float, is_causal: bool) -> Tensor:
    """See :func:`omnimoe.ops.attend`."""
    return call(torch.ops.omnimoe.attend, query, key, value, mask, scale, is_causal)

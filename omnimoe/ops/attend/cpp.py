"""The compiled kernels for a CPU; the gradient's makes the scores again."""

from __future__ import annotations

import torch
from torch import Tensor

from omnimoe.ops._library import call


def attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float, is_causal: bool) -> Tensor:
    """See :func:`omnimoe.ops.attend`."""
    keep = torch.is_grad_enabled() and any(part.requires_grad for part in (query, key, value))
    return call(torch.ops.omnimoe.attend, query, key, value, mask, scale, is_causal, keep)[0]

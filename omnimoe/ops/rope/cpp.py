"""The compiled kernel for a CPU: one pass, rounded once; the gradient is the rotation back."""

from __future__ import annotations

import torch
from torch import Tensor

from omnimoe.ops._library import call


def rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """See :func:`omnimoe.ops.rope`."""
    wide = torch.promote_types(x.dtype, torch.float32)
    return call(torch.ops.omnimoe.rope, x, cos.to(wide).contiguous(), sin.to(wide).contiguous())

"""The compiled kernels for a CPU: keeps the input and one number a row for backward."""

from __future__ import annotations

import torch
from torch import Tensor

from omnimoe.ops._library import call
from omnimoe.ops._spans import check_offsets


def rms_norm(x: Tensor, weight: Tensor, offsets: Tensor | None, eps: float) -> Tensor:
    """See :func:`omnimoe.ops.rms_norm`."""
    if offsets is not None:
        check_offsets(offsets, x.shape[0])
    # the scale has the dtype of the rows, as in the definition, and is read in that of the sums
    scale = weight.to(x.dtype).to(torch.promote_types(x.dtype, torch.float32)).contiguous()
    y, _ = call(torch.ops.omnimoe.rms_norm, x, scale, offsets, eps)
    return y

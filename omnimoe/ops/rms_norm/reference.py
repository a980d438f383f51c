"""The definition: normalise in float32, cast back, scale by the weight of the row's group."""

from __future__ import annotations

import torch
from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor, offsets: Tensor | None, eps: float) -> Tensor:
    """See :func:`omnimoe.ops.rms_norm`."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    normal = (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)).to(x.dtype)
    if offsets is None:
        return weight[0].to(x.dtype) * normal
    row = torch.arange(x.shape[0], device=x.device, dtype=torch.int32)
    group = torch.searchsorted(offsets, row, right=True)
    shape = (x.shape[0], *(1,) * (x.ndim - 2), x.shape[-1])
    scale = weight[group.clamp(max=weight.shape[0] - 1)].to(x.dtype).view(shape)
    return torch.where((group < weight.shape[0]).view(-1, *(1,) * (x.ndim - 1)), scale * normal, x.new_zeros(()))

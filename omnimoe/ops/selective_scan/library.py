"""The fused scan of mamba_ssm, where it is installed. Written by its documentation, and not run yet."""

from __future__ import annotations

from torch import Tensor


def selective_scan(
    x: Tensor, step: Tensor, rate: Tensor, into: Tensor, out: Tensor, state: None, starts: None
) -> tuple[Tensor, Tensor]:
    """See :func:`omnimoe.ops.selective_scan`; without a state to begin with."""
    from mamba_ssm.ops.selective_scan_interface import selective_scan_fn  # type: ignore[import-not-found]

    x, step, into, out = (part.transpose(1, 2).contiguous() for part in (x, step, into, out))
    y, last = selective_scan_fn(x, step, rate.contiguous(), into, out, return_last_state=True)
    return y.transpose(1, 2), last

"""The fused kernels of a library: the gather, the activation and the weighted sum are parts of the two products."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from omnimoe.ops._library import call
from omnimoe.ops._spans import check_offsets
from omnimoe.ops.experts_mlp.activations import CODES


def fused(library: str, *, checks_offsets: bool = False) -> Callable[..., Tensor]:
    """The op of one library of kernels.

    Args:
        library: namespace of its ops, ``"omnimoe"`` or ``"omnimoe_triton"``.
        checks_offsets: read them on the host first, where that costs no synchronisation.
    """

    def experts_mlp(
        x: Tensor,
        gate_up_proj: Tensor,
        down_proj: Tensor,
        offsets: Tensor,
        activation: str,
        token_index: Tensor | None,
        weights: Tensor | None,
        gate_up_bias: Tensor | None,
        down_bias: Tensor | None,
        interleaved: bool,
        save: str,
    ) -> Tensor:
        """See :func:`omnimoe.ops.experts_mlp`. Keeps its input and what ``save`` says for backward, nothing else."""
        if checks_offsets:
            check_offsets(offsets, len(x) if token_index is None else len(token_index))
        if weights is not None:
            weights = weights.to(torch.promote_types(x.dtype, torch.float32))
        operands = x, gate_up_proj, down_proj, offsets, token_index, weights, gate_up_bias, down_bias
        wanted = torch.is_grad_enabled() and any(part is not None and part.requires_grad for part in operands)
        keep = wanted and save == "pre_activation"
        out, _ = call(getattr(torch.ops, library).experts_mlp, *operands, CODES[activation], interleaved, keep)
        return out

    return experts_mlp

"""Attention of given queries, keys and values."""

from __future__ import annotations

import torch
from torch import Tensor

from omnimoe.ops._backends import Implementation, choose, kernels_first, why_not_compiled
from omnimoe.ops.attend import cpp, fused, reference


def attend(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None, *, scale: float, is_causal: bool = False
) -> Tensor:
    """``softmax(scale * query @ key.T) @ value`` for every head, the scores of the softmax in float32.

    Args:
        query: ``(B, H, Q, C)`` floating point.
        key: ``(B, H_kv, K, C)``, H a multiple of H_kv: queries that share a key stand next to each other.
        value: ``(B, H_kv, K, C_v)``.
        mask: ``(B, 1 or H, Q, K)`` bool, True where a query sees a key, or what is added to the scores; B may be 1.
            Every query must see a key.
        scale: of the scores.
        is_causal: a query sees no later key, the last query being at the last key; then there is no mask.

    Returns:
        ``(B, Q, H, C_v)`` in the dtype of ``query`` (under autocast, of autocast).

    Raises:
        ValueError: if the shapes do not fit, or a mask comes with ``is_causal``.

    Source: without the matrix of scores, https://arxiv.org/abs/2205.14135.
    """
    batch_size, num_heads, query_length, width = query.shape
    num_kv_heads, key_length = key.shape[1:3]
    if key.shape != (batch_size, num_kv_heads, key_length, width) or value.shape[:3] != key.shape[:3]:
        raise ValueError(
            f"key must be ({batch_size}, H_kv, K, {width}) and value as long, got {tuple(key.shape)} and "
            f"{tuple(value.shape)}"
        )
    if num_heads % num_kv_heads:
        raise ValueError(f"the {num_heads} heads of query must be a multiple of the {num_kv_heads} of key")
    if mask is not None and (is_causal or mask.shape[2:] != (query_length, key_length)):
        told = "one beside is_causal" if is_causal else tuple(mask.shape)
        raise ValueError(f"mask must be (B, 1, {query_length}, {key_length}), got {told}")
    kind = query.device.type
    if torch.is_autocast_enabled(kind):
        dtype = torch.get_autocast_dtype(kind)
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
        mask = mask if mask is None or mask.dtype == torch.bool else mask.to(dtype)
    order = KERNELS_FIRST if _suits_kernel(query) else IMPLEMENTATIONS
    operands = query, key, value, mask
    return choose("attend", order, *operands, scale, is_causal)(*operands, scale, is_causal)


def _suits_kernel(query: Tensor) -> bool:
    """Whether the compiled kernel is ahead: on a CPU, where no graph is traced."""
    return query.device.type == "cpu" and not torch.compiler.is_compiling()


def _why_not_kernel(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float, is_causal: bool
) -> str:
    if mask is not None and (mask.dtype != torch.bool or mask.shape[1] != 1):
        return f"a mask of {mask.dtype} {tuple(mask.shape)} adds to the scores, or differs by head"
    if not query.dtype == key.dtype == value.dtype:
        return f"dtypes differ: {query.dtype}, {key.dtype} and {value.dtype}"
    return why_not_compiled(query, key, value)


IMPLEMENTATIONS = (
    Implementation("torch", fused.attend),
    Implementation("cpp", cpp.attend, _why_not_kernel),
    Implementation("reference", reference.attend),
)
KERNELS_FIRST = kernels_first(IMPLEMENTATIONS)
"""On a CPU: keys are packed once for all the queries that share them and never copied for each, and keys that a mask
hides in front or behind are left out."""

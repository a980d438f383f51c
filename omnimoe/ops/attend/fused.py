"""PyTorch's fused attention, which copies keys and values for each query that shares them, but for a single query."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float, is_causal: bool) -> Tensor:
    """See :func:`omnimoe.ops.attend`."""
    batch_size, num_heads, query_length, width = query.shape
    num_kv_heads, key_length = key.shape[1:3]
    if query_length == 1 and (mask is None or mask.shape[1] == 1):
        # queries that share a key stand in its place as one head's, so that no key is copied
        query = query.reshape(batch_size, num_kv_heads, num_heads // num_kv_heads, width)
    elif num_heads != num_kv_heads:
        key, value = (for_each_query(part, num_heads // num_kv_heads) for part in (key, value))
    seen: dict[str, Any] = {"attn_mask": mask}
    if is_causal and query_length > 1:
        seen = {"is_causal": True}
        if query_length != key_length:
            square = torch.ones(query_length, key_length, dtype=torch.bool, device=query.device)
            seen = {"attn_mask": square.tril(key_length - query_length)}
    mixed = F.scaled_dot_product_attention(query, key, value, scale=scale, **seen)
    return mixed.reshape(batch_size, num_heads, query_length, mixed.shape[-1]).transpose(1, 2)


def for_each_query(part: Tensor, groups: int) -> Tensor:
    """``(B, H_kv, K, C)`` keys or values to ``(B, H, K, C)``; where all queries share one, it is not copied."""
    return part.unsqueeze(2).expand(-1, -1, groups, -1, -1).flatten(1, 2)

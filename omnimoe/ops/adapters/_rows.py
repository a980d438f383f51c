"""Routed rows in the two forms that other libraries want."""

from __future__ import annotations

import torch
from torch import Tensor


def group_of_rows(offsets: Tensor, num_rows: int) -> Tensor:
    """``(R,)`` int64, the group of each row; G for rows past the last offset."""
    row = torch.arange(num_rows, device=offsets.device, dtype=offsets.dtype)
    return torch.searchsorted(offsets, row, right=True)


def rows_by_token(token_index: Tensor, offsets: Tensor, num_tokens: int) -> Tensor | None:
    """``(T, K)`` int64: the routed rows of each token, where every token has K of them and all are in a group.

    None where that does not hold. To know it the host reads one number from the device; both libraries read others.
    """
    if num_tokens == 0 or len(token_index) % num_tokens:
        return None
    tokens, order = token_index.sort(stable=True)
    every = torch.arange(num_tokens, device=tokens.device).repeat_interleave(len(tokens) // num_tokens)
    if not bool(((tokens == every).all() & (offsets[-1] == len(tokens))).item()):
        return None
    return order.view(num_tokens, -1)

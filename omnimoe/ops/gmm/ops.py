"""``grouped_gemm.ops``: the product with gradients, and the copies before and after it."""

from __future__ import annotations

import torch
from torch import Tensor

from omnimoe.ops._rows import take_rows
from omnimoe.ops.combine import combine
from omnimoe.ops.gmm import backend


def gmm(a: Tensor, b: Tensor, batch_sizes: Tensor, trans_b: bool = False) -> Tensor:
    """Multiplies each block of consecutive rows of ``a`` by its own matrix; both get gradients.

    Args:
        a: ``(R, K)``, rows in group order.
        b: ``(G, K, N)``, or ``(G, N, K)`` with ``trans_b``.
        batch_sizes: ``(G,)`` int64 or int32, the number of rows of each group, on the CPU or the device of ``a``.
        trans_b: whether the matrices of ``b`` are transposed.

    Returns:
        ``(R, N)``.

    Raises:
        ValueError: if the shapes do not fit.

    Example:
        >>> b = torch.stack([torch.eye(2), 2 * torch.eye(2)])
        >>> gmm(torch.ones(3, 2), b, torch.tensor([1, 2])).tolist()
        [[1.0, 1.0], [2.0, 2.0], [2.0, 2.0]]
    """
    return backend.gmm(a, b, batch_sizes, trans_b=trans_b)


def permute(
    input_act: Tensor, indices: Tensor, num_out_tokens: int | None = None, max_token_num: int = 0
) -> tuple[Tensor, Tensor]:
    """Copies each token once for each of its experts, in the order of experts.

    Args:
        input_act: ``(T, D)``.
        indices: ``(T, K)`` or ``(T,)`` integers, the experts of each token; a negative one comes last.
        num_out_tokens: how many rows to keep, the first; all where None or not above 0.
        max_token_num: memory to set aside for so many tokens; nothing is, it is here for callers that pass it.

    Returns:
        The rows ``(R, D)``; and ``(K * T,)`` int32, the row that each entry became, all first experts before all second
        ones, -1 where it was not kept.

    Raises:
        ValueError: if there is not one entry a token.
    """
    if indices.ndim not in (1, 2) or len(indices) != len(input_act):
        raise ValueError(f"indices must be ({len(input_act)}, K), got {tuple(indices.shape)}")
    chosen = indices.reshape(len(indices), -1 if indices.numel() else 1).long()
    ids = chosen.reshape(-1)
    order = torch.where(ids < 0, torch.iinfo(torch.int64).max, ids).argsort(stable=True)
    if num_out_tokens is not None and num_out_tokens > 0:
        order = order[:num_out_tokens]
    row = ids.new_full(ids.shape, -1, dtype=torch.int32)
    row[order] = torch.arange(len(order), device=row.device, dtype=torch.int32)
    top_k = chosen.shape[1]
    return take_rows(input_act, order // top_k), row.view(-1, top_k).t().reshape(-1)


def unpermute(input_act: Tensor, row_id_map: Tensor, probs: Tensor | None = None) -> Tensor:
    """Puts rows back in the order of tokens, and adds up those of one token with its weights.

    Args:
        input_act: ``(R, D)``, in the order that :func:`permute` gave.
        row_id_map: ``(K * T,)``, its second result.
        probs: ``(T, K)``, what each row counts for; without it nothing is added, and there are K * T rows.

    Returns:
        ``(T, D)`` in the dtype of ``input_act``; what was not kept adds nothing.

    Raises:
        ValueError: if ``probs`` does not fit the map.
    """
    if probs is not None and (probs.ndim != 2 or probs.numel() != len(row_id_map)):
        raise ValueError(f"probs must be (T, K) with {len(row_id_map)} entries, got {tuple(probs.shape)}")
    rows, tokens = len(input_act), len(row_id_map) if probs is None else len(probs)
    # one place more, for the entries that have no row
    place = torch.where(row_id_map < 0, rows, row_id_map.long())
    entry = place.new_zeros(rows + 1)
    entry[place] = torch.arange(len(place), device=place.device)
    entry = entry[:rows]
    weights = input_act.new_ones(rows) if probs is None else probs.t().reshape(-1)[entry]
    return combine(input_act, entry % max(1, tokens), weights, tokens)

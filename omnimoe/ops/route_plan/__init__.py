"""Where each routed row goes: the order that the grouped products need, made once a layer."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from omnimoe.ops._backends import Implementation, choose, why_not_compiled, why_not_cuda
from omnimoe.ops.route_plan import cpp, cuda, reference, triton
from omnimoe.ops.triton import why_not_triton


class RoutePlan(NamedTuple):
    """Routed rows in group order.

    Args:
        offsets: ``(G,)`` int32, the end of each group's rows.
        order: ``(R,)`` int64; sorted row r is entry ``order[r]`` of the ids.
        token_index: ``(R,)`` int64; sorted row r is of token ``token_index[r]``.
        inverse: ``(R,)`` int64; entry i became sorted row ``inverse[i]``.
    """

    offsets: Tensor
    order: Tensor
    token_index: Tensor
    inverse: Tensor


def route_plan(expert_ids: Tensor, num_groups: int) -> RoutePlan:
    """Sorts routed rows by group; equal ids keep their order. Nothing is read back to the host.

    Args:
        expert_ids: ``(T, K)`` int64, the groups of each token; or ``(R,)``, where every entry is a token of its own.
            Ids below 0 or from ``num_groups`` on are sentinels: they come last, past the last offset, and so have
            neither results nor gradients.
        num_groups: G.

    Returns:
        The :class:`RoutePlan` of the ``R = T * K`` entries.

    Raises:
        ValueError: if ``expert_ids`` is of another shape or dtype, or ``num_groups`` is below 1.

    Example:
        >>> import torch
        >>> plan = route_plan(torch.tensor([[2, 0], [0, 7]]), 3)
        >>> plan.offsets.tolist(), plan.order.tolist(), plan.token_index.tolist()
        ([2, 2, 3], [1, 2, 0, 3], [0, 1, 0, 1])
    """
    if expert_ids.ndim not in (1, 2) or expert_ids.is_floating_point() or expert_ids.is_complex():
        raise ValueError(
            f"expert_ids must be (T, K) or (R,) integers, got {tuple(expert_ids.shape)} {expert_ids.dtype}"
        )
    if num_groups < 1:
        raise ValueError(f"num_groups must be at least 1, got {num_groups}")
    ids = expert_ids.reshape(-1).long()
    offsets, order, inverse = choose("route_plan", IMPLEMENTATIONS, ids)(ids, num_groups)
    token_index = order if expert_ids.ndim == 1 else order // expert_ids.shape[1]
    return RoutePlan(offsets, order, token_index, inverse)


IMPLEMENTATIONS = (
    Implementation("cpp", cpp.route_plan, why_not_compiled),
    Implementation("cuda", cuda.route_plan, why_not_cuda),
    Implementation("torch", reference.route_plan),
    Implementation("triton", triton.route_plan, why_not_triton),
    Implementation("reference", reference.route_plan),
)

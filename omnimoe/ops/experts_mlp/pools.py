"""Networks in pools of unequal width: one call a pool, whose results are added up by token."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from omnimoe.ops._pools import check_pools, runs


def experts_mlp(
    network: Callable[..., Tensor],
    x: Tensor,
    banks: tuple[Any, Any],
    biases: tuple[Any, Any],
    offsets: Tensor,
    activation: str,
    token_index: Tensor | None,
    weights: Tensor | None,
    options: dict[str, Any],
) -> Tensor:
    """See :func:`omnimoe.ops.experts_mlp`; ``network`` is it, for one pool."""
    into, down = banks
    given = {"gate_up_proj": into, "down_proj": down, "gate_up_bias": biases[0], "down_bias": biases[1]}
    wrong = [name for name, part in given.items() if isinstance(part, Tensor)]
    if wrong or len({len(part) for part in given.values() if part is not None}) > 1:
        lengths = {
            name: 1 if isinstance(part, Tensor) else len(part) for name, part in given.items() if part is not None
        }
        raise ValueError(f"with pools, all banks and biases must be lists of as many, got {lengths}")
    check_pools(into, offsets)
    num_rows = len(x) if token_index is None else len(token_index)
    nothing = [None] * len(into)
    taken_by = runs([len(pool) for pool in into], offsets, num_rows)
    columns = zip(into, down, biases[0] or nothing, biases[1] or nothing, taken_by, strict=True)
    parts: list[Tensor] = []
    for gate_up_proj, down_proj, gate_up_bias, down_bias, run in columns:
        more = {"gate_up_bias": gate_up_bias, "down_bias": down_bias, **options}
        rows: Any = run.rows if run.place is None else run.place
        each = None if weights is None else weights[rows]
        if token_index is not None:
            tokens, taken = x, token_index[rows]
        elif run.place is None:
            tokens, taken = x[rows], None
        else:
            tokens, taken = x, run.place
        parts.append(network(tokens, gate_up_proj, down_proj, run.offsets, activation, taken, each, **more))
    if token_index is None and run.place is None:
        rest = num_rows - sum(len(part) for part in parts)
        return torch.cat([*parts, parts[0].new_zeros(rest, parts[0].shape[1])])
    return sum(parts[1:], parts[0])

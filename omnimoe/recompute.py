"""Layers whose activations are recomputed in backward, by experts that were chosen once.

A router that is asked a second time may answer otherwise: what reaches it went through kernels whose sums depend on
the order of threads, and in bfloat16 the scores of two experts are often equal to the last bit or next to it. Gradients
would then be those of other experts. So what was chosen in the forward pass is kept and used again.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from dataclasses import fields
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map_only, tree_unflatten
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

aten = torch.ops.aten

CHOOSING = frozenset(
    {
        *(aten.topk, aten.sort, aten.argsort, aten.msort, aten.kthvalue, aten.argmax, aten.argmin),
        *(aten.max, aten.min, aten.nonzero, aten.multinomial, aten.bernoulli, aten.searchsorted, aten.bucketize),
        *(aten.ge, aten.gt, aten.le, aten.lt),
    }
)
"""Operations whose result jumps where their input moves a little: what a router chooses with."""


class Choices(TorchDispatchMode):
    """Inside ``with choices:``, operations of :data:`CHOOSING` give on a later turn what they gave on the first."""

    def __init__(self) -> None:
        super().__init__()
        self._kept: list[Any] = []
        self._next = 0

    def rewind(self) -> None:
        """Begins a turn."""
        self._next = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket not in CHOOSING:
            return func(*args, **(kwargs or {}))
        if self._next == len(self._kept):
            self._kept.append(_copied(func(*args, **(kwargs or {}))))
        self._next += 1
        # a copy, since the caller may change what it is given
        return _copied(self._kept[self._next - 1])


def _copied(result: Any) -> Any:
    return tree_map_only(torch.Tensor, torch.clone, result)


def _policy(context: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    chooses = getattr(op, "overloadpacket", None) in CHOOSING
    return CheckpointPolicy.MUST_SAVE if chooses else CheckpointPolicy.PREFER_RECOMPUTE


_kept_in_graph = functools.partial(create_selective_checkpoint_contexts, _policy)
"""What :class:`Choices` does, for a graph that a compiler cuts into forward and backward."""


def recompute(checkpoint: Callable, run: Callable, x: Any, rows: Any, *rest: Any) -> tuple[Any, Any, Any]:
    """A block under ``checkpoint``: the same routing each time, and all of it with its graph.

    A function that is checkpointed in the reentrant way gives tensors alone their graph, so the routing, which holds
    the balance losses, is taken apart inside and put together outside.

    Args:
        checkpoint: ``torch.utils.checkpoint.checkpoint`` with its settings.
        run: the block, ``(x, rows, ...) -> (x, routings, weights or None)``.
        x: ``(N, D)`` rows.
        rows: their layout.
        rest: other arguments.

    Returns:
        What ``run`` gives.
    """
    if torch.compiler.is_compiling():

        def traced(x: Any, rows: Any, *rest: Any) -> tuple[Any, Any, Any]:
            # what rows remember must not leave the region that is recomputed
            return run(x, dataclasses.replace(rows, _per_towers={}), *rest)

        return checkpoint(traced, x, rows, *rest, use_reentrant=False, context_fn=_kept_in_graph)
    choices = Choices()
    form: list[Any] = []

    def flat(x: Any, rows: Any, *rest: Any) -> tuple[Any, ...]:
        choices.rewind()
        x, routings, weights = run(x, dataclasses.replace(rows, choices=choices), *rest)
        held = [
            None if routing is None else {field.name: getattr(routing, field.name) for field in fields(routing)}
            for routing in routings
        ]
        leaves, structure = tree_flatten((x, held, weights))
        form[:] = [structure, [type(routing) for routing in routings]]
        return tuple(leaves)

    leaves = checkpoint(flat, x, rows, *rest)
    structure, kinds = form
    x, held, weights = tree_unflatten(list(leaves), structure)
    routings = (None if part is None else kind(**part) for kind, part in zip(kinds, held, strict=True))
    return x, tuple(routings), weights

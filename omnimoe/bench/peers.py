"""Who computes: ours and those we are measured by, each as its users call it, from the router's answer on.

A peer gets a :class:`~omnimoe.bench.problem.Problem` and operands, which may be the problem's own, copies that need
gradients, or the same in float64. Sorting rows by expert is part of the work.
"""

from __future__ import annotations

import importlib.metadata
import types
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from omnimoe.bench.problem import Problem
from omnimoe.ops import BACKENDS, backend, experts_mlp, grouped_mm, permute, route_plan
from omnimoe.ops.adapters import liger

Call = Callable[..., Tensor]


@dataclass(frozen=True)
class Peer:
    """One who computes.

    Args:
        name: column heading and key of results.
        package: the distribution whose version is told.
        about: what it runs.
        calls: op to the function of a problem and its operands.
        why_not: gives the reason why it cannot, or an empty string.
    """

    name: str
    package: str
    about: str
    calls: dict[str, Call]
    why_not: Callable[[Problem], str] = lambda problem: ""

    @property
    def version(self) -> str | None:
        """Of its package; None where that is not installed."""
        try:
            return importlib.metadata.version(self.package)
        except importlib.metadata.PackageNotFoundError:
            return None


def sort_rows(chosen: Tensor, num_experts: int) -> tuple[Tensor, Tensor]:
    """Entries of ``chosen`` in order of their expert, ``(R,)``, and the end of each expert's rows, ``(E,)`` int32."""
    ids, order = chosen.reshape(-1).sort(stable=True)
    ends = torch.searchsorted(ids, torch.arange(num_experts, device=ids.device), right=True)
    return order, ends.to(torch.int32)


def sum_by_token(y: Tensor, order: Tensor, weights: Tensor) -> Tensor:
    """The weighted sum as transformers takes it: back into the order of tokens, then over the experts of each."""
    y = y * weights.reshape(-1)[order].unsqueeze(1)
    inverse = torch.empty_like(order)
    inverse[order] = torch.arange(len(order), device=order.device)
    return y[inverse].view(*weights.shape, -1).sum(1)


def _ours(problem: Problem, x: Tensor, into: Tensor, down: Tensor, weights: Tensor) -> Tensor:
    plan = route_plan(problem.chosen, len(into))
    scale = permute(weights.reshape(-1), plan.order, plan.inverse)
    return experts_mlp(x, into, down, plan.offsets, "silu", plan.token_index, scale)


def _our_product(problem: Problem, x: Tensor, weight: Tensor) -> Tensor:
    return grouped_mm(x, weight, problem.offsets)


def _transformers(problem: Problem, x: Tensor, into: Tensor, down: Tensor, weights: Tensor) -> Tensor:
    from transformers.integrations.moe import (
        _default_apply_gate,
        batched_mm_experts_forward,
        grouped_mm_experts_forward,
    )

    module = types.SimpleNamespace(
        num_experts=len(into), _is_expert_parallel=False, has_gate=True, has_bias=False, is_transposed=False,
        has_post_expert_norm=False, gate_up_proj=into, down_proj=down, act_fn=F.silu,
    )  # fmt: skip
    module._apply_gate = lambda y: _default_apply_gate(module, y)
    # off a CPU its generation switches to batched products
    decodes = problem.shape.is_decoding and x.device.type != "cpu"
    return (batched_mm_experts_forward if decodes else grouped_mm_experts_forward)(module, x, problem.chosen, weights)


def _torch(problem: Problem, x: Tensor, into: Tensor, down: Tensor, weights: Tensor) -> Tensor:
    order, ends = sort_rows(problem.chosen, len(into))
    gate, up = _torch_product(problem, x[order // problem.shape.top_k], into, ends).chunk(2, -1)
    return sum_by_token(_torch_product(problem, F.silu(gate) * up, down, ends), order, weights)


def _torch_product(problem: Problem, x: Tensor, weight: Tensor, ends: Tensor | None = None) -> Tensor:
    return F.grouped_mm(x, weight.transpose(1, 2), offs=problem.offsets if ends is None else ends)


def _loop(problem: Problem, x: Tensor, into: Tensor, down: Tensor, weights: Tensor) -> Tensor:
    order, ends = sort_rows(problem.chosen, len(into))
    rows = x[order // problem.shape.top_k].tensor_split(ends[:-1].tolist())
    parts = []
    # unbound once: a gradient of every weight[e] would be as large as the whole bank
    for part, one, other in zip(rows, into.unbind(), down.unbind(), strict=True):
        gate, up = F.linear(part, one).chunk(2, -1)
        parts.append(F.linear(F.silu(gate) * up, other))
    return sum_by_token(torch.cat(parts), order, weights)


def _loop_product(problem: Problem, x: Tensor, weight: Tensor) -> Tensor:
    rows = x.tensor_split(problem.offsets[:-1].tolist())
    return torch.cat([F.linear(part, one) for part, one in zip(rows, weight.unbind(), strict=True)])


def _liger(problem: Problem, x: Tensor, into: Tensor, down: Tensor, weights: Tensor) -> Tensor:
    return liger.function().apply(x, into, down, problem.chosen.int(), weights)


OURS = "omnimoe"
LOOP = Peer("loop", "torch", "one product an expert", {"experts_mlp": _loop, "grouped_mm": _loop_product})
PEERS = {
    peer.name: peer
    for peer in (
        LOOP,
        Peer(
            "torch",
            "torch",
            "torch.nn.functional.grouped_mm, with a gather before and a sum after",
            {"experts_mlp": _torch, "grouped_mm": _torch_product},
        ),
        Peer(
            "transformers",
            "transformers",
            "its grouped_mm experts; decoding on a GPU, its batched_mm",
            {"experts_mlp": _transformers},
        ),
        Peer(
            "liger",
            "liger-kernel",
            "LigerFusedMoEFunction",
            {"experts_mlp": _liger},
            lambda problem: liger.why_not(*problem.operands[:3]),
        ),
        Peer(OURS, "omnimoe", "what omnimoe takes by itself", {"experts_mlp": _ours, "grouped_mm": _our_product}),
    )
}
"""Name to peer, in the order of columns."""


def our_backend(name: str) -> Peer:
    """Ours through one backend: ``omnimoe/triton``.

    Raises:
        ValueError: if there is none of this name; one that is merely missing is told where it is to run.
    """
    if name not in BACKENDS:
        raise ValueError(f"unknown backend {name!r}; known: {', '.join(BACKENDS)}")

    def through(call: Call) -> Call:
        def run(problem: Problem, *operands: Tensor) -> Tensor:
            with backend(name):
                return call(problem, *operands)

        return run

    calls = {op: through(call) for op, call in PEERS[OURS].calls.items()}
    return Peer(f"{OURS}/{name}", "omnimoe", f"omnimoe with OMNIMOE_BACKEND={name}", calls)


def peers_for(op: str, names: list[str] | None = None, backends: list[str] | None = None) -> list[Peer]:
    """The peers that have an op, ours last.

    Raises:
        ValueError: if a name is unknown or does not have the op, or there is no such backend.
    """
    for name in names or ():
        if name not in PEERS or op not in PEERS[name].calls:
            known = ", ".join(peer.name for peer in PEERS.values() if op in peer.calls)
            raise ValueError(f"no peer {name!r} for {op}; there are {known}")
    found = [peer for peer in PEERS.values() if op in peer.calls and (not names or peer.name in {*names, OURS})]
    return found + [our_backend(name) for name in backends or ()]

"""What everybody is given in one run: operands, routing, and the answer in float64."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from omnimoe.bench.shapes import ROUTINGS, Shape

OPS = {
    "experts_mlp": ("x", "gate_up_proj", "down_proj", "weights"),
    "grouped_mm": ("x", "weight"),
}
"""Op to the names of what it is given and has gradients for."""


@dataclass(frozen=True)
class Problem:
    """One piece of work.

    Args:
        op: a name of :data:`OPS`.
        shape: the sizes.
        operands: in the order of :data:`OPS`; of ``experts_mlp`` x ``(T, D)``, ``(E, 2F, D)``, ``(E, D, F)`` and
            ``(T, K)``; of ``grouped_mm``, which is its first product alone, x ``(R, D)`` sorted and ``(E, 2F, D)``.
        chosen: ``(T, K)`` int64, the experts of each token.
        offsets: ``(E,)`` int32, the end of each expert's rows.
        grad: the gradient that the result gets.
    """

    op: str
    shape: Shape
    operands: tuple[Tensor, ...]
    chosen: Tensor
    offsets: Tensor
    grad: Tensor

    @property
    def flops(self) -> float:
        """Of the forward pass; backward has twice as many."""
        shape = self.shape
        return (6 if self.op == "experts_mlp" else 4) * shape.rows * shape.hidden_size * shape.intermediate_size

    @property
    def dtype(self) -> torch.dtype:
        """Of the operands."""
        return self.operands[0].dtype

    @property
    def device(self) -> torch.device:
        """Of the operands."""
        return self.operands[0].device


def draw(
    op: str, shape: Shape, dtype: torch.dtype, device: torch.device | str, *, routing: str = "uniform", seed: int = 0
) -> Problem:
    """Draws a problem; the same arguments give the same numbers on one kind of device.

    Args:
        op: a name of :data:`OPS`.
        shape: the sizes.
        dtype: of the operands.
        device: where they lie.
        routing: a name of :data:`~omnimoe.bench.shapes.ROUTINGS`.
        seed: of the generator.
    """
    generator = torch.Generator(device).manual_seed(seed)

    def normal(*size: int, scale: float = 1.0) -> Tensor:
        return torch.randn(*size, dtype=dtype, device=device, generator=generator).mul_(scale)

    hidden, width, experts = shape.hidden_size, shape.intermediate_size, shape.num_experts
    chosen, weights = draw_routing(routing, shape, device, generator)
    every = torch.arange(experts, device=device)
    offsets = torch.searchsorted(chosen.reshape(-1).sort().values, every, right=True).to(torch.int32)
    into = normal(experts, 2 * width, hidden, scale=1 / math.sqrt(hidden))
    if op == "grouped_mm":
        operands: tuple[Tensor, ...] = normal(shape.rows, hidden), into
        return Problem(op, shape, operands, chosen, offsets, normal(shape.rows, 2 * width))
    down = normal(experts, hidden, width, scale=1 / math.sqrt(width))
    operands = normal(shape.tokens, hidden), into, down, weights.to(dtype)
    return Problem(op, shape, operands, chosen, offsets, normal(shape.tokens, hidden))


def draw_routing(
    routing: str, shape: Shape, device: torch.device | str, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Experts and weights of each token, ``(T, K)`` int64 and float32.

    Raises:
        ValueError: if the routing is unknown.
    """
    if routing not in ROUTINGS:
        raise ValueError(f"unknown routing {routing!r}; known: {', '.join(ROUTINGS)}")
    size = shape.tokens, shape.num_experts
    if routing == "zipf":
        # the largest of logarithms of probabilities with Gumbel's noise: drawn by probability, without replacement
        noise = torch.rand(size, device=device, generator=generator).clamp_(1e-9, 1 - 1e-7)
        logits = -(-noise.log()).log() - torch.arange(1, shape.num_experts + 1, device=device).log()
    else:
        logits = torch.randn(size, device=device, generator=generator)
    weights, chosen = logits.softmax(-1).topk(shape.top_k, -1)
    if routing == "one-hot":
        chosen = torch.arange(shape.top_k, device=device).expand_as(chosen).contiguous()
    return chosen, weights

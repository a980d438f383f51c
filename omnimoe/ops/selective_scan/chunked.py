"""The scan in chunks of time: of the states, ``S`` numbers for each number of ``x``, one a chunk is kept.

A gradient makes the states of a chunk again from the one it began with. To a traced graph the scan is one operation,
whatever its length. It has no second derivative; the reference implementation has.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

CHUNK = {"cpu": 64, "cuda": 256}
"""Positions whose states are there at once."""
SPAN = 16
"""Positions that follow one another inside a chunk on an accelerator; all spans of the chunk go side by side."""


def selective_scan(
    x: Tensor, step: Tensor, rate: Tensor, into: Tensor, out: Tensor, state: Tensor | None, starts: Tensor | None
) -> tuple[Tensor, Tensor]:
    """See :func:`omnimoe.ops.selective_scan`; operands of one dtype."""
    y, last, _ = torch.ops.omnimoe.chunked_scan(x, step, rate, into, out, state, starts)
    return y, last


def by_position(decay: Tensor, driven: Tensor, state: Tensor) -> Tensor:
    """Turns ``driven`` into the states ``h[t] = decay[t] * h[t - 1] + driven[t]``, one position after the other.

    Args:
        decay: ``(T, ...)``.
        driven: ``(T, ...)``, overwritten.
        state: ``(...)``, ``h[-1]``.

    Returns:
        ``driven``.
    """
    for time in range(len(driven)):
        state = torch.addcmul(driven[time], decay[time], state, out=driven[time])
    return driven


def by_span(decay: Tensor, driven: Tensor, state: Tensor) -> Tensor:
    """The same in fewer steps: within all spans at once, then from span to span. See :func:`by_position`."""
    whole = len(driven) // SPAN * SPAN
    spans, decays = (part[:whole].view(-1, SPAN, *state.shape) for part in (driven, decay))
    reach = decays.clone()
    for place in range(1, SPAN):
        spans[:, place].addcmul_(decays[:, place], spans[:, place - 1])
        reach[:, place].mul_(reach[:, place - 1])
    for span, through in zip(spans, reach, strict=True):
        state = span.addcmul_(through, state)[-1]
    by_position(decay[whole:], driven[whole:], state)
    return driven


def _recur(decay: Tensor, driven: Tensor, state: Tensor) -> Tensor:
    return (by_position if driven.device.type == "cpu" else by_span)(decay, driven, state)


def _chunks(x: Tensor) -> list[slice]:
    size = CHUNK.get(x.device.type, CHUNK["cuda"])
    return [slice(first, first + size) for first in range(0, x.shape[1], size)]


def _terms(
    x: Tensor, step: Tensor, rate: Tensor, into: Tensor, starts: Tensor | None, chunk: slice
) -> tuple[Tensor, Tensor]:
    """Decay and input of each position, ``(T, B, I, S)`` both."""
    moved = step[:, chunk].transpose(0, 1)
    decay = (moved.unsqueeze(-1) * rate).exp_()
    if starts is not None:
        decay = decay.masked_fill_(starts[:, chunk].t()[:, :, None, None], 0)
    driven = (moved * x[:, chunk].transpose(0, 1)).unsqueeze(-1) * into[:, chunk].transpose(0, 1).unsqueeze(2)
    return decay, driven


@torch.library.custom_op("omnimoe::chunked_scan", mutates_args=())
def _forward(
    x: Tensor, step: Tensor, rate: Tensor, into: Tensor, out: Tensor, state: Tensor | None, starts: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """``y (B, T, I)``, the last state ``(B, I, S)``, and the state before each chunk ``(chunks, B, I, S)``."""
    current = x.new_zeros(x.shape[0], *rate.shape) if state is None else state
    y, chunks = torch.empty_like(x, memory_format=torch.contiguous_format), _chunks(x)
    kept = x.new_empty(len(chunks), *current.shape)
    for place, chunk in enumerate(chunks):
        kept[place] = current
        states = _recur(*_terms(x, step, rate, into, starts, chunk), current)
        y[:, chunk] = (states @ out[:, chunk].transpose(0, 1).unsqueeze(-1)).squeeze(-1).transpose(0, 1)
        current = states[-1]
    return y, current.clone(), kept


@_forward.register_fake
def _(x, step, rate, into, out, state, starts):
    size = CHUNK.get(x.device.type, CHUNK["cuda"])
    shape = (x.shape[0], *rate.shape)
    return x.new_empty(x.shape), x.new_empty(shape), x.new_empty((x.shape[1] + size - 1) // size, *shape)


@torch.library.custom_op("omnimoe::chunked_scan_backward", mutates_args=())
def _backward(
    grad: Tensor,
    grad_last: Tensor,
    x: Tensor,
    step: Tensor,
    rate: Tensor,
    into: Tensor,
    out: Tensor,
    starts: Tensor | None,
    kept: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The gradients of x, step, rate, into, out and of the state before the first position."""
    grads = [torch.empty_like(part, memory_format=torch.contiguous_format) for part in (x, step, into, out)]
    grad_x, grad_step, grad_into, grad_out = grads
    grad_rate, carried = torch.zeros_like(rate), grad_last
    for before, chunk in reversed(list(zip(kept, _chunks(x), strict=True))):
        decay, driven = _terms(x, step, rate, into, starts, chunk)
        states = _recur(decay, driven, before)
        given, writes, reads, moved, entered = (
            part[:, chunk].transpose(0, 1) for part in (grad, into, out, step, x)
        )  # (T, B, ...)
        grad_out[:, chunk] = (given.unsqueeze(-2) @ states).squeeze(-2).transpose(0, 1)
        later = torch.cat((torch.ones_like(decay[:1]), decay[1:].flip(0)))
        wanted = _recur(later, given.flip(0).unsqueeze(-1) * reads.flip(0).unsqueeze(2), carried).flip(0)
        carried = decay[0] * wanted[0]
        written = (wanted @ writes.unsqueeze(-1)).squeeze(-1)  # (T, B, I)
        grad_x[:, chunk] = (written * moved).transpose(0, 1)
        grad_into[:, chunk] = ((moved * entered).unsqueeze(-2) @ wanted).squeeze(-2).transpose(0, 1)
        faded = torch.cat((before.unsqueeze(0), states[:-1])).mul_(decay).mul_(wanted)
        grad_step[:, chunk] = (written * entered + (faded * rate).sum(-1)).transpose(0, 1)
        grad_rate += (faded * moved.unsqueeze(-1)).sum((0, 1))
    return grad_x, grad_step, grad_rate, grad_into, grad_out, carried.clone()


@_backward.register_fake
def _(grad, grad_last, x, step, rate, into, out, starts, kept):
    return tuple(part.new_empty(part.shape) for part in (x, step, rate, into, out, grad_last))


def _keep(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor, Tensor]) -> None:
    x, step, rate, into, out, state, starts = inputs
    ctx.has_state = state is not None
    ctx.mark_non_differentiable(output[2])
    ctx.save_for_backward(x, step, rate, into, out, starts, output[2])


def _differentiate(ctx: Any, grad: Tensor, grad_last: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
    x, step, rate, into, out, starts, kept = ctx.saved_tensors
    *grads, grad_state = torch.ops.omnimoe.chunked_scan_backward(
        grad, grad_last, x, step, rate, into, out, starts, kept
    )
    return *grads, grad_state if ctx.has_state else None, None


_forward.register_autograd(_differentiate, setup_context=_keep)

"""Errors first, then seconds: nobody is timed whose results are not right."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from omnimoe.bench.peers import LOOP, Call, Peer
from omnimoe.bench.problem import OPS, Problem

Work = Callable[[], list[Tensor]]

BOUNDS = {torch.float32: 4e-6, torch.bfloat16: 1e-2, torch.float16: 2e-3, torch.float64: 1e-12}
"""Relative Frobenius error against float64 up to which results are right, values and gradients."""
DENSE = "dense"
"""Not a peer but a yardstick: plain products of as many FLOP."""
FORWARD, BOTH, DECODING = "forward", "forward and backward", "decoding"
LEAST_SECONDS = 0.02
"""A timing holds so many calls that it lasts this long."""


def kinds(problem: Problem) -> tuple[str, ...]:
    """What is timed of a shape."""
    return (DECODING,) if problem.shape.is_decoding else (FORWARD, BOTH)


def flops(problem: Problem, kind: str) -> float:
    """Of one call: backward has two products for each of the forward pass."""
    return problem.flops * (3 if kind == BOTH else 1)


def work(problem: Problem, call: Call, kind: str) -> Work:
    """A piece of work that gives the value and, with backward, the gradients of all operands."""
    if kind != BOTH:

        def forward() -> list[Tensor]:
            with torch.no_grad():
                return [call(problem, *problem.operands)]

        return forward

    def both() -> list[Tensor]:
        given = [part.detach().requires_grad_() for part in problem.operands]
        y = call(problem, *given)
        return [y.detach(), *torch.autograd.grad(y, given, problem.grad, materialize_grads=True)]

    return both


def dense_work(problem: Problem, kind: str) -> Work:
    """Plain products of as many FLOP, without routing, activation or autograd; the results mean nothing."""
    pairs = []
    for weight in problem.operands[1:3]:
        one = weight[0]
        rows, grad = (one.new_empty(problem.shape.rows, width).normal_() for width in reversed(one.shape))
        pairs.append((rows, one, grad))

    def products() -> list[Tensor]:
        found = []
        for rows, one, grad in pairs:
            found.append(rows.mm(one.t()))
            if kind == BOTH:
                found += [grad.mm(one), grad.t().mm(rows)]
        return found

    return products


def exact(problem: Problem) -> list[Tensor]:
    """Value and gradients in float64, by one product an expert."""
    given = [part.double().requires_grad_() for part in problem.operands]
    y = LOOP.calls[problem.op](problem, *given)
    return [y.detach(), *torch.autograd.grad(y, given, problem.grad.double())]


def errors(problem: Problem, peer: Peer, right: Sequence[Tensor]) -> dict[str, float]:
    """Relative Frobenius error of the value and of each gradient; infinite where something is not finite."""
    kind = kinds(problem)[-1]
    names = ["y", *(f"gradient of {name}" for name in OPS[problem.op])]
    found = {}
    for name, one, two in zip(names, work(problem, peer.calls[problem.op], kind)(), right, strict=False):
        error = float((one.double() - two).norm() / two.norm())
        found[name] = error if math.isfinite(error) else math.inf
    return found


def check(problem: Problem, peers: Sequence[Peer]) -> tuple[dict[str, dict[str, float]], dict[str, str]]:
    """Errors of every peer that can, and why the others are not timed."""
    right, found, reasons = exact(problem), {}, {}
    bound = BOUNDS[problem.dtype]
    for peer in peers:
        reason = peer.why_not(problem)
        if not reason:
            try:
                found[peer.name] = errors(problem, peer, right)
            except (RuntimeError, ValueError, NotImplementedError) as error:
                reason = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
            else:
                worst = max(found[peer.name], key=lambda name: found[peer.name][name])
                if not found[peer.name][worst] <= bound:
                    reason = f"the error of {worst} is {found[peer.name][worst]:.1e}, above {bound:.0e}"
        if reason:
            reasons[peer.name] = reason
    return found, reasons


def seconds(jobs: dict[str, Work], rounds: int, device: torch.device) -> dict[str, list[float]]:
    """Seconds a call in every round, in turn, so that what drifts does so for all.

    Every other round goes backwards, so that nobody always follows the same neighbour. On a CPU with one thread the
    clock is the thread's own, which another program does not stop; on CUDA the device's.

    Args:
        jobs: name to work.
        rounds: how many; a call before them warms up, a second says how many calls a timing needs.
        device: where it runs.
    """
    clock = _cuda_clock if device.type == "cuda" else _cpu_clock
    repeats = {}
    for name, job in jobs.items():
        job()
        repeats[name] = max(1, min(1000, math.ceil(LEAST_SECONDS / max(clock(job, 1), 1e-7))))
    found: dict[str, list[float]] = {name: [] for name in jobs}
    for round_ in range(rounds):
        for name in list(jobs) if round_ % 2 else reversed(jobs):
            found[name].append(clock(jobs[name], repeats[name]))
    return found


def headline(times: Sequence[float], device: torch.device) -> float:
    """One number of many: the least on a CPU, which others only slow down; on CUDA the median."""
    return statistics.median(times) if device.type == "cuda" else min(times)


def _cpu_clock(job: Work, repeats: int) -> float:
    clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
    started = clock()
    for _ in range(repeats):
        job()
    return (clock() - started) / repeats


def _cuda_clock(job: Work, repeats: int) -> float:
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    for _ in range(repeats):
        job()
    stop.record()
    torch.cuda.synchronize()
    return start.elapsed_time(stop) / 1e3 / repeats

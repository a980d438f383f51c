"""The shapes and peers of ``omnimoe bench`` under pytest-benchmark, grouped by shape, dtype and work.

    pytest benchmarks --benchmark-enable -k "moma_tiny and float32" --benchmark-json=out.json

On a GPU the published models' own shapes, on a CPU those cut down to it, with one thread. Without
``--benchmark-enable`` everything is held against float64 and runs once. Who errs is not timed: a peer is skipped with
the reason, ours fails.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator

import pytest
import torch

from omnimoe.bench.measure import BOTH, DECODING, DENSE, FORWARD, Work, check, dense_work, flops, kinds, work
from omnimoe.bench.peers import OURS, PEERS, peers_for
from omnimoe.bench.problem import OPS, Problem, draw
from omnimoe.bench.shapes import SHAPES, default_shapes

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = ("bfloat16",) if DEVICE == "cuda" else ("float32", "bfloat16")
CASES = [
    pytest.param(op, shape, dtype, kind, name, id=f"{op}-{shape}-{dtype}-{kind.replace(' ', '-')}-{name}")
    for op in OPS
    for shape in default_shapes(DEVICE)
    for dtype in DTYPES
    for kind in ((DECODING,) if SHAPES[shape].is_decoding else (FORWARD, BOTH))
    for name in (DENSE, *(peer.name for peer in peers_for(op)))
]


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@functools.lru_cache(maxsize=1)  # cases of one problem follow each other, and a large one leaves no room for two
def checked(op: str, shape: str, dtype: str) -> tuple[Problem, dict[str, dict[str, float]], dict[str, str]]:
    """A problem, the errors of all peers, and why some are not timed."""
    problem = draw(op, SHAPES[shape], getattr(torch, dtype), DEVICE)
    return problem, *check(problem, peers_for(op))


def finished(job: Work) -> Work:
    """A job that ends when the device has done it."""

    def run() -> list[torch.Tensor]:
        found = job()
        if DEVICE == "cuda":
            torch.cuda.synchronize()
        return found

    return run


@pytest.mark.parametrize(("op", "shape", "dtype", "kind", "name"), CASES)
def test_ops(benchmark, op, shape, dtype, kind, name):
    problem, errors, reasons = checked(op, shape, dtype)
    assert kind in kinds(problem)
    if name in reasons:
        (pytest.fail if name == OURS else pytest.skip)(f"{name}: {reasons[name]}")
    job = dense_work(problem, kind) if name == DENSE else work(problem, PEERS[name].calls[op], kind)
    benchmark.group = f"{op}, {shape}, {dtype}, {kind}"
    benchmark.extra_info.update(
        peer=name,
        version=torch.__version__ if name == DENSE else PEERS[name].version,
        torch=torch.__version__,
        flops=flops(problem, kind),
        error=max(errors[name].values()) if name in errors else None,
        device=torch.cuda.get_device_name() if DEVICE == "cuda" else "one thread of a CPU",
    )
    assert benchmark(finished(job))

"""All shapes, dtypes and peers, to a table's worth of numbers."""

from __future__ import annotations

import platform
import re
import statistics
from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from omnimoe.bench.measure import DENSE, check, dense_work, flops, headline, kinds, seconds, work
from omnimoe.bench.memory import Meter, peak_bytes, saved_bytes
from omnimoe.bench.peers import OURS, Peer, peers_for
from omnimoe.bench.problem import draw
from omnimoe.bench.shapes import SHAPES, Shape
from omnimoe.ops._extension import extension


def bench(
    shapes: dict[str, Shape],
    dtypes: Sequence[str],
    *,
    op: str = "experts_mlp",
    device: str = "cpu",
    routing: str = "uniform",
    rounds: int = 7,
    threads: int = 1,
    peers: list[str] | None = None,
    backends: list[str] | None = None,
    memory: bool = True,
    seed: int = 0,
    on_shape: Callable[[str, str], None] = lambda dtype, shape: None,
) -> dict[str, Any]:
    """Measures; nothing is timed whose results are not right in this run.

    Args:
        shapes: name to sizes.
        dtypes: names such as ``"bfloat16"``.
        op: ``"experts_mlp"``, from the router's answer to the sum, or ``"grouped_mm"``, its first product alone.
        device: ``"cpu"``, ``"cuda"`` or ``"cuda:1"``.
        routing: how rows fall to experts.
        rounds: timings of each.
        threads: of PyTorch on the CPU.
        peers: names; all that have the op where None.
        backends: of ours, each as a peer besides what omnimoe takes by itself.
        memory: whether to measure that too.
        seed: of operands and routing.
        on_shape: told each dtype and shape before it is measured.

    Returns:
        JSON's own types: where and with what it ran, and by dtype and shape the seconds, GFLOP/s, share of the dense
        product, ratio to ours, errors, bytes, and reasons why a peer was not timed.

    Raises:
        ValueError: for another device, or a name that is unknown.
    """
    place = torch.device(device)
    if place.type not in ("cpu", "cuda"):
        raise ValueError(f"it measures on cpu and cuda, not on {device!r}")
    if place.index is not None and place.type == "cuda":
        torch.cuda.set_device(place)  # clocks and counts are of the current one
    torch.set_num_threads(threads)
    taking_part = peers_for(op, peers, backends)
    result = {**_where(place.type), "op": op, "routing": routing, "rounds": rounds, "threads": threads, "seed": seed,
              "peers": {peer.name: {"version": peer.version, "about": peer.about} for peer in taking_part},
              "results": {}}  # fmt: skip
    meter = Meter(threads) if memory and place.type == "cpu" else None
    for dtype in dtypes:
        rows = result["results"][dtype] = {}
        for name, shape in shapes.items():
            on_shape(dtype, name)
            drawn = {"op": op, "shape": shape, "dtype": getattr(torch, dtype), "device": device, "routing": routing,
                     "seed": seed}  # fmt: skip
            rows[name] = _measure(drawn, taking_part, rounds, memory, meter)
    return result


def mean_ratios(result: dict[str, Any], dtype: str, kind: str) -> dict[str, float]:
    """Geometric means over shapes of how many times longer each peer takes than ours."""
    found: dict[str, list[float]] = {}
    for row in result["results"][dtype].values():
        for peer, told in row["work"].get(kind, {}).items():
            if told.get("ratio") and peer not in (OURS, DENSE):
                found.setdefault(peer, []).append(told["ratio"])
    return {peer: statistics.geometric_mean(ratios) for peer, ratios in found.items()}


def _measure(
    drawn: dict[str, Any], peers: Sequence[Peer], rounds: int, memory: bool, meter: Meter | None
) -> dict[str, Any]:
    problem = draw(**drawn)
    shape = problem.shape
    errors, reasons = check(problem, peers)
    timed = [peer for peer in peers if peer.name not in reasons]
    done: dict[str, Any] = {}
    for kind in kinds(problem):
        jobs = {DENSE: dense_work(problem, kind)}
        jobs |= {peer.name: work(problem, peer.calls[problem.op], kind) for peer in timed}
        found = seconds(jobs, rounds, problem.device)
        best = {name: headline(times, problem.device) for name, times in found.items()}
        done[kind] = {
            name: {"seconds": best[name], "rounds": found[name], "GFLOP/s": flops(problem, kind) / best[name] / 1e9,
                   "share of dense": best[DENSE] / best[name],
                   "ratio": best[name] / best[OURS] if OURS in best else None}
            for name in jobs
        }  # fmt: skip
        for peer in timed if memory else ():
            done[kind][peer.name]["peak bytes"] = (
                meter.peak_bytes(peer.name, kind, **drawn) if meter else peak_bytes(problem, peer, kind)
            )
    return {
        "shape": {"tokens": shape.tokens, "hidden_size": shape.hidden_size, "num_experts": shape.num_experts,
                  "intermediate_size": shape.intermediate_size, "top_k": shape.top_k, "about": shape.about},
        "rows an expert": shape.rows_per_expert, "most rows an expert": _most(problem.offsets),
        "errors": errors, "not timed": reasons, "work": done,
        "saved bytes": {} if shape.is_decoding or not memory else {
            peer.name: saved_bytes(problem, peer) for peer in timed
        },
    }  # fmt: skip


def _most(offsets: torch.Tensor) -> int:
    return int(offsets.diff(prepend=offsets.new_zeros(1)).max())


def _where(device: str) -> dict[str, Any]:
    kernels = extension()
    info = Path("/proc/cpuinfo")
    model = re.search(r"^model name\s*:\s*(.+)$", info.read_text(), re.MULTILINE) if info.exists() else None
    return {
        "date": datetime.now(UTC).date().isoformat(),
        "device": torch.cuda.get_device_name() if device == "cuda" else (model[1] if model else platform.machine()),
        "torch": torch.__version__, "CUDA": torch.version.cuda if device == "cuda" else None,
        "python": platform.python_version(), "CPU kernels": kernels.instructions or kernels.reason,
    }  # fmt: skip


def named(names: Sequence[str], tokens: int | None = None) -> dict[str, Shape]:
    """Shapes by name, with another number of tokens where one is given.

    Raises:
        ValueError: if a name is unknown.
    """
    for name in names:
        if name not in SHAPES:
            raise ValueError(f"unknown shape {name!r}; known: {', '.join(SHAPES)}")
    return {name: replace(SHAPES[name], tokens=tokens) if tokens else SHAPES[name] for name in names}

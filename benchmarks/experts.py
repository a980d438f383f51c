"""The experts' network beside transformers' and a dense product of equal FLOPs: forward, and forward with backward.

Shapes are those of published models, cut down to what a CPU does in a second. Weights are drawn, routing is that of a
random linear router. Every implementation is held against float64 before anything is timed. Times are the least of
several, in turn, of the thread's own clock where there is one thread; the figures are ratios of one run.

    python benchmarks/experts.py --dtypes float32 bfloat16 --out benchmarks/results/DATE-experts-cpu.json
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
import types
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import torch
import transformers
from torch import Tensor
from transformers.integrations.moe import _default_apply_gate, grouped_mm_experts_forward

import omnimoe
from omnimoe.ops import experts_mlp
from omnimoe.ops._extension import extension

SHAPES = {
    "mixtral_8x7b/8": (128, 512, 1792, 8, 2),
    "olmoe_1b_7b/2": (256, 1024, 512, 64, 8),
    "qwen3_30b_a3b/2": (256, 1024, 384, 128, 8),
    "dsv3/8": (256, 896, 256, 256, 8),
    "moma_1p4b_4t4i/2": (1024, 768, 2048, 8, 1),
    "bagel_7b_mot/8": (1024, 448, 2368, 2, 1),
    "moma_tiny": (512, 256, 704, 8, 1),
    "qwen3 decode, T = 8": (8, 1024, 384, 128, 8),
    "olmoe decode, T = 1": (1, 1024, 512, 64, 8),
}
"""Name, with what widths were divided by, to tokens, hidden size, expert width, experts, experts a token."""

Work = Callable[[], list[Tensor]]


def works(shape: tuple[int, ...], dtype: torch.dtype) -> tuple[dict[str, Work], dict[str, Work], list[Tensor]]:
    """Forward and forward with backward of each implementation, and the values in float64."""
    tokens, hidden, width, experts, taken = shape
    generator = torch.Generator().manual_seed(0)
    x, grad = (torch.randn(tokens, hidden, generator=generator) for _ in range(2))
    into = torch.randn(experts, 2 * width, hidden, generator=generator) / hidden**0.5
    down = torch.randn(experts, hidden, width, generator=generator) / width**0.5
    weights, chosen = torch.softmax(torch.randn(tokens, experts, generator=generator), -1).topk(taken, -1)
    operands = [part.to(dtype) for part in (x, into, down)]
    grad, flat = grad.to(dtype), weights.to(dtype)

    def ours(x: Tensor, into: Tensor, down: Tensor, weights: Tensor) -> Tensor:
        ids, order = chosen.reshape(-1).sort(stable=True)
        ends = torch.searchsorted(ids, torch.arange(experts), right=True).int()
        return experts_mlp(x, into, down, ends, "silu", order // taken, weights.reshape(-1)[order])

    def theirs(x: Tensor, into: Tensor, down: Tensor, weights: Tensor) -> Tensor:
        module = types.SimpleNamespace(
            num_experts=experts, _is_expert_parallel=False, has_gate=True, has_bias=False, is_transposed=False,
            has_post_expert_norm=False, gate_up_proj=into, down_proj=down, act_fn=torch.nn.functional.silu,
        )  # fmt: skip
        module._apply_gate = lambda y: _default_apply_gate(module, y)
        return grouped_mm_experts_forward(module, x, chosen, weights)

    def dense(x: Tensor, into: Tensor, down: Tensor, weights: Tensor) -> Tensor:
        rows.mm(into[0].t())
        return hidden_rows.mm(down[0].t())

    rows = torch.randn(tokens * taken, hidden, generator=generator).to(dtype)
    hidden_rows = torch.randn(tokens * taken, width, generator=generator).to(dtype)

    def forward(call: Callable[..., Tensor]) -> Work:
        def work() -> list[Tensor]:
            with torch.no_grad():
                return [call(*operands, flat)]

        return work

    def both(call: Callable[..., Tensor]) -> Work:
        def work() -> list[Tensor]:
            given = [part.detach().requires_grad_() for part in (*operands, flat)]
            y = call(*given)
            return [y.detach(), *torch.autograd.grad(y, given, grad)]

        return work

    exact = [part.double().requires_grad_() for part in (*operands, flat)]
    with omnimoe.backend("torch"):
        y = ours(*exact)
        right = [y.detach(), *torch.autograd.grad(y, exact, grad.double())]
    calls = {"transformers": theirs, "omnimoe": ours}
    return (
        {**{name: forward(call) for name, call in calls.items()}, "dense": forward(dense)},
        {name: both(call) for name, call in calls.items()},
        right,
    )


def errors(work: Work, right: list[Tensor]) -> list[float]:
    """Relative Frobenius error of each result."""
    found = work()
    return [float((one.double() - two).norm() / two.norm()) for one, two in zip(found, right, strict=False)]


def least(jobs: dict[str, Work], rounds: int) -> dict[str, float]:
    """Seconds of the fastest round of each, in turn, after one that does not count."""
    clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
    best = dict.fromkeys(jobs, math.inf)
    for round_ in range(rounds + 1):
        for name, job in jobs.items():
            started = clock()
            job()
            if round_:
                best[name] = min(best[name], clock() - started)
    return best


def measure(shape: tuple[int, ...], dtype: torch.dtype, rounds: int) -> dict:
    """One shape: errors, seconds, GFLOP/s and ratios."""
    tokens, hidden, width, _, taken = shape
    work = 6 * tokens * taken * hidden * width / 1e9
    forward, both, right = works(shape, dtype)
    found = {name: errors(job, right) for name, job in both.items()}
    bound = {torch.float32: 4e-6, torch.bfloat16: 1e-2}[dtype]
    if not max(found["omnimoe"]) <= bound:
        raise SystemExit(f"{shape}: errors of {found['omnimoe']} in {dtype}, above {bound}; nothing is timed")
    one, two = least(forward, rounds), least(both, max(2, rounds // 2))
    return {
        "shape": shape, "rows an expert": tokens * taken / shape[3], "errors": found,
        "forward": {"seconds": one, "GFLOP/s": {name: work / s for name, s in one.items()},
                    "ratio": one["transformers"] / one["omnimoe"], "share of dense": one["dense"] / one["omnimoe"]},
        "forward and backward": {"seconds": two, "GFLOP/s": {name: 3 * work / s for name, s in two.items()},
                                 "ratio": two["transformers"] / two["omnimoe"]},
    }  # fmt: skip


def main() -> None:
    """Runs the benchmark and prints a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--dtypes", nargs="+", choices=("float32", "bfloat16"), default=["float32", "bfloat16"])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, help="write the result as JSON")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)

    result: dict = {
        "date": datetime.now(UTC).date().isoformat(), "threads": args.threads, "torch": torch.__version__,
        "transformers": transformers.__version__, "kernels": extension().instructions or extension().reason,
        "results": {},
    }  # fmt: skip
    print(f"{'':9}{'':22}{'GFLOP/s forward':>26}{'':8}{'and backward':>20}")
    print(
        f"{'dtype':9}{'shape':22}{'dense':>8}{'theirs':>8}{'ours':>8}{'ratio':>8}{'theirs':>9}{'ours':>7}{'ratio':>8}"
    )
    for name in args.dtypes:
        rows = result["results"][name] = {}
        for shape in args.shapes:
            row = rows[shape] = measure(SHAPES[shape], getattr(torch, name), args.rounds)
            one, two = row["forward"], row["forward and backward"]
            print(
                f"{name:9}{shape:22}{one['GFLOP/s']['dense']:8.0f}{one['GFLOP/s']['transformers']:8.0f}"
                f"{one['GFLOP/s']['omnimoe']:8.0f}{one['ratio']:8.2f}{two['GFLOP/s']['transformers']:9.0f}"
                f"{two['GFLOP/s']['omnimoe']:7.0f}{two['ratio']:8.2f}",
                flush=True,
            )
        means = {part: statistics.geometric_mean(row[part]["ratio"] for row in rows.values())
                 for part in ("forward", "forward and backward")}  # fmt: skip
        print(f"{name:9}{'geometric mean':22}{'':24}{means['forward']:8.2f}{'':16}{means['forward and backward']:8.2f}")
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

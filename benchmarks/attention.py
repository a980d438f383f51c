"""The CPU's attention beside PyTorch's fused one, forward and backward, first right against float64, then in turn.

Packed documents are those of a batch of the shipped corpus: a row sees the earlier ones of its own document.

    python benchmarks/attention.py --out benchmarks/results/DATE-attention-cpu.json
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

import torch
from torch import Tensor

from omnimoe.data import Corpus, PackedSequences, default_ranges
from omnimoe.ops import attend, backend
from omnimoe.ops._extension import extension

BACKENDS = {"torch": "torch", "omnimoe": "cpp"}
TOLERANCES = {torch.float32: 4e-6, torch.bfloat16: 1e-2}


@dataclass(frozen=True)
class Case:
    """Sequences, query heads, heads of keys and values, positions, and numbers of a head."""

    batch: int
    heads: int
    kv_heads: int
    length: int
    width: int
    is_packed: bool = False


CASES = {
    "moe_micro, 4,096 tokens": Case(8, 10, 10, 512, 32),
    "documents in sequences of 256": Case(8, 6, 6, 256, 32, is_packed=True),
    "documents in sequences of 1,024": Case(2, 10, 10, 1024, 32, is_packed=True),
    "four queries a key": Case(2, 16, 4, 512, 64),
    "long, wide heads": Case(1, 8, 8, 1024, 128),
}


def documents(case: Case) -> Tensor:
    """``(B, 1, T, T)`` bool, True where a token sees another: itself and what came before it in its document."""
    corpus = Corpus.load("p")
    packed = PackedSequences(corpus, default_ranges(corpus), sequence_length=case.length, batch_size=case.batch)
    segments = torch.as_tensor(next(packed)["segment_ids"])
    is_own = segments[:, :, None] == segments[:, None]
    return (is_own & torch.ones(case.length, case.length, dtype=torch.bool).tril()).unsqueeze(1)


def mixed(name: str, operands: list[Tensor], mask: Tensor | None, case: Case) -> Tensor:
    """What comes out of a backend."""
    query, key, value = operands
    with backend(name):
        return attend(query, key, value, mask, scale=case.width**-0.5, is_causal=not case.is_packed)


def slopes(name: str, operands: list[Tensor], mask: Tensor | None, case: Case, grad: Tensor) -> list[Tensor]:
    """The same, and the gradients of query, key and value."""
    inputs = [part.detach().requires_grad_() for part in operands]
    out = mixed(name, inputs, mask, case)
    return [out.detach(), *torch.autograd.grad(out, inputs, grad.to(out.dtype))]


def measure(case: Case, dtype: torch.dtype, rounds: int) -> dict[str, dict[str, float]]:
    """Milliseconds of the thread's clock, the least of all rounds, and the largest relative error, by who and what."""
    draw = torch.Generator().manual_seed(0)
    shapes = [(case.batch, case.length, heads, case.width) for heads in (case.heads, case.kv_heads, case.kv_heads)]
    operands = [torch.randn(*shape, generator=draw).to(dtype).transpose(1, 2) for shape in shapes]
    grad = torch.randn(*shapes[0], generator=draw).to(dtype)
    mask = documents(case) if case.is_packed else None
    exact = slopes("reference", [part.double() for part in operands], mask, case, grad)
    told: dict[str, dict[str, float]] = {}
    for name, taken in BACKENDS.items():
        found = slopes(taken, operands, mask, case, grad)
        error = max(float((a.double() - b).norm() / b.norm()) for a, b in zip(found, exact, strict=True))
        if not error < TOLERANCES[dtype]:
            raise SystemExit(f"{name} is off by {error:.1e}; nothing is timed")
        told[name] = {"error": error, "forward": float("inf"), "forward and backward": float("inf")}

    def forward(taken: str) -> None:
        with torch.no_grad():
            mixed(taken, operands, mask, case)

    works: dict[str, Callable[[str], object]] = {
        "forward": forward,
        "forward and backward": lambda taken: slopes(taken, operands, mask, case, grad),
    }
    for _ in range(rounds):
        for name, taken in BACKENDS.items():
            for kind, work in works.items():
                started = time.thread_time()
                work(taken)
                told[name][kind] = min(told[name][kind], 1e3 * (time.thread_time() - started))
    return told


def main() -> None:
    """Runs the benchmark and prints a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--out", type=Path, help="write the result as JSON")
    args = parser.parse_args()
    torch.set_num_threads(1)  # the clock is the thread's
    if reason := extension().reason:
        raise SystemExit(f"the CPU kernels are missing: {reason}")
    result: dict = {
        "date": datetime.now(UTC).date().isoformat(), "torch": torch.__version__, "threads": 1, "rounds": args.rounds,
        "kernels": extension().instructions, "cases": {name: asdict(case) for name, case in CASES.items()}, "work": {},
    }  # fmt: skip
    ratios: list[float] = []
    print(f"milliseconds of one thread, torch {torch.__version__} / omnimoe, and their ratio")
    for dtype in TOLERANCES:
        for name, case in CASES.items():
            told = measure(case, dtype, args.rounds)
            result["work"][f"{name}, {str(dtype).removeprefix('torch.')}"] = told
            line = f"{name}, {dtype}".ljust(52)
            for kind in ("forward", "forward and backward"):
                theirs, ours = told["torch"][kind], told["omnimoe"][kind]
                ratios.append(theirs / ours)
                line += f"{kind} {theirs:.1f} / {ours:.1f}, {theirs / ours:.2f}   "
            print(line, flush=True)
    print(f"geometric mean of all {statistics.geometric_mean(ratios):.2f}")
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

"""One command for an hour on a GPU: builds the CUDA kernels, checks them, and times them beside every peer.

    python benchmarks/gpu.py --minutes 25 --out benchmarks/results/DATE-gpu.json

Parts run in order of what is wanted most: device, build, tests, then shapes of models one by one, in a process that is
replaced when a part fails or hangs: a kernel that goes wrong takes its process's CUDA down with it. What is known is
written after every part, so that an end at any time loses one part. Nothing is timed whose results are not right in the
same run. On Hopper the kernels for every device are timed too, as ``omnimoe/cuda (sm_80)``.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import multiprocessing
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
MODULES = {"transformers": "transformers", "liger": "liger_kernel"}
"""Peers to what they import."""
TOKENS = (32768, 2048, 8192)
"""Of every shape, the one that counts most first; 64 tokens are a shape of their own."""


class Worker:
    """A process that computes what it is asked for, and can be replaced."""

    def __init__(self) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipe, other = context.Pipe()
        self.process = context.Process(target=_serve, args=(other,), daemon=True)
        self.process.start()
        other.close()

    def ask(self, function: Callable[..., Any], arguments: tuple[Any, ...], seconds: float) -> Any:
        """The function's result.

        Raises:
            RuntimeError: if it fails, takes its process down, or is not done in time; the worker is of no use then.
        """
        self.pipe.send((function.__name__, arguments))
        if not self.pipe.poll(seconds):
            self.process.kill()
            raise RuntimeError(f"not done in {seconds:.0f} s")
        try:
            is_right, result = self.pipe.recv()
        except EOFError:
            raise RuntimeError("its process ended") from None
        if not is_right:
            raise RuntimeError(result)
        return result


def _serve(pipe: Any) -> None:
    sys.path.insert(0, str(ROOT))
    while True:
        name, arguments = pipe.recv()
        try:
            pipe.send((True, globals()[name](*arguments)))
        except Exception as error:  # told to the other side, which replaces this process
            pipe.send((False, f"{type(error).__name__}: {str(error)[:2000]}"))


class Session:
    """What has been found so far, and until when there is time.

    Args:
        out: the JSON file, written after every part.
        minutes: after which no part is begun.
    """

    def __init__(self, out: Path, minutes: float) -> None:
        self.out, self.end = out, time.monotonic() + 60 * minutes
        self.found: dict[str, Any] = {"date": datetime.now(UTC).date().isoformat(), "parts": {}}
        self.worker: Worker | None = None

    def part(self, name: str, function: Callable[..., Any], *arguments: Any, seconds: float = 240) -> Any:
        """Runs one part in the worker; its result, or None where it failed or there was no time for it."""
        left = self.end - time.monotonic()
        if left < 0:
            return self._keep(name, {"status": "no time"})
        print(f"== {name}", flush=True)
        started = time.monotonic()
        if self.worker is None:
            self.worker = Worker()
        try:
            result = self.worker.ask(function, arguments, seconds)
        except (RuntimeError, OSError) as error:
            print(f"failed: {error}", flush=True)
            self.worker.process.kill()
            self.worker = None
            return self._keep(name, {"status": "failed", "error": str(error), "seconds": time.monotonic() - started})
        self._keep(name, {"status": "done", "seconds": time.monotonic() - started, "result": result})
        return result

    def _keep(self, name: str, told: dict[str, Any]) -> None:
        self.found["parts"][name] = told
        self.out.parent.mkdir(parents=True, exist_ok=True)
        self.out.write_text(json.dumps(self.found, indent=1) + "\n", encoding="utf-8")


def device() -> dict[str, Any]:
    """What we are on."""
    import torch

    about = torch.cuda.get_device_properties(0)
    return {
        "name": about.name, "capability": f"{about.major}.{about.minor}", "memory": about.total_memory,
        "multiprocessors": about.multi_processor_count, "torch": torch.__version__, "CUDA": torch.version.cuda,
    }  # fmt: skip


def build() -> dict[str, Any]:
    """Builds the kernels where they are looked for, if they are not there."""
    from omnimoe.ops import _extension

    path = _extension.find("cuda") or _extension.build(_extension.cache_folder(), "cuda")
    found = _extension.extension("cuda")
    if found.reason:
        raise RuntimeError(found.reason)
    return {"library": str(path), "instructions": found.instructions}


def tests(seconds: float) -> dict[str, Any]:
    """The tests on a device."""
    from omnimoe.ops._extension import cache_folder

    command = [
        sys.executable,
        "-m",
        "pytest",
        "tests/cuda/test_device.py",
        "-q",
        "--tb=short",
        "-p",
        "no:cacheprovider",
    ]
    environment = {**os.environ, "OMNIMOE_KERNELS": str(cache_folder())}
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False, timeout=seconds
    )
    print(done.stdout[-6000:], flush=True)
    if done.returncode:
        raise RuntimeError(f"pytest ended with {done.returncode}: {done.stdout[-1500:]}")
    return {"told": done.stdout[-300:]}


def timings(
    op: str, name: str, tokens: int, routing: str, rounds: int, backends: list[str], on: str = "cuda"
) -> dict[str, Any]:
    """One shape, all peers that are installed."""
    import torch

    from omnimoe.bench.peers import PEERS
    from omnimoe.bench.run import bench
    from omnimoe.bench.shapes import SHAPES

    torch.cuda.empty_cache()
    shape = SHAPES[name] if SHAPES[name].is_decoding else replace(SHAPES[name], tokens=tokens)
    missing = {peer for peer, module in MODULES.items() if importlib.util.find_spec(module) is None}
    peers = [peer for peer in PEERS if peer not in missing and op in PEERS[peer].calls]
    common: dict[str, Any] = {"op": op, "device": on, "routing": routing, "rounds": rounds, "memory": False}
    found = bench({name: shape}, ["bfloat16"], peers=peers, backends=backends, **common)
    result = found["results"]["bfloat16"][name]
    result["not timed"].update(dict.fromkeys(missing, "not installed"))
    if "cuda" in backends and torch.cuda.get_device_capability()[0] == 9:
        os.environ["OMNIMOE_CUDA_KERNELS"] = "sm_80"
        try:
            lesser = bench({name: shape}, ["bfloat16"], peers=["torch"], backends=["cuda"], **common)
        finally:
            del os.environ["OMNIMOE_CUDA_KERNELS"]
        row = lesser["results"]["bfloat16"][name]
        for kind, done in row["work"].items():
            if "omnimoe/cuda" in done:
                result["work"][kind]["omnimoe/cuda (sm_80)"] = done["omnimoe/cuda"]
        if "omnimoe/cuda" in row["not timed"]:
            result["not timed"]["omnimoe/cuda (sm_80)"] = row["not timed"]["omnimoe/cuda"]
    _tell(f"{op} {name} T={shape.tokens} {routing}", result)
    return result


def _tell(title: str, row: dict[str, Any]) -> None:
    for kind, done in row["work"].items():
        rates = ", ".join(f"{peer} {told['GFLOP/s'] / 1e3:.0f}" for peer, told in done.items())
        print(f"{title}, {kind}, TFLOP/s: {rates}", flush=True)
    for peer, reason in row["not timed"].items():
        print(f"{title}: {peer} was not timed: {reason}", flush=True)


def table(found: dict[str, Any]) -> str:
    """Milliseconds and TFLOP/s of every shape as Markdown."""
    lines = []
    for name, part in found["parts"].items():
        if part["status"] != "done":
            lines.append(f"| {name} | {part['status']} {part.get('error', '')[:120]} |")
            continue
        for kind, done in (part["result"] or {}).get("work", {}).items():
            cells = (f"{peer} {1e3 * of['seconds']:.3f} ms, {of['GFLOP/s'] / 1e3:.0f}" for peer, of in done.items())
            lines.append(f"| {name}, {kind} | {' | '.join(cells)} |")
    return "\n".join(lines)


def plan() -> list[tuple[str, str, int, str]]:
    """Op, shape, tokens and routing of every timing, the most wanted first."""
    from omnimoe.bench.shapes import FULL

    names = [name for name, shape in FULL.items() if not shape.is_decoding]
    found = [(op, name, TOKENS[0], "uniform") for op in ("grouped_mm", "experts_mlp") for name in names]
    found += [("experts_mlp", name, shape.tokens, "uniform") for name, shape in FULL.items() if shape.is_decoding]
    found += [("experts_mlp", name, TOKENS[0], "zipf") for name in names]
    found += [(op, name, tokens, "uniform") for tokens in TOKENS[1:] for op in ("experts_mlp", "grouped_mm")
              for name in names]  # fmt: skip
    return found + [("experts_mlp", name, TOKENS[0], "one-hot") for name in names]


def main() -> int:
    """Runs all parts; 0 if there was a device and kernels for it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "gpu.json")
    parser.add_argument("--minutes", type=float, default=30, help="no part is begun after these")
    parser.add_argument("--rounds", type=int, default=7, help="timings of each, in turn")
    parser.add_argument("--shapes", nargs="+", help="only these")
    parser.add_argument("--no-tests", action="store_true", help="leave the tests out")
    args = parser.parse_args()
    session = Session(args.out, args.minutes)
    if session.part("device", device) is None:
        return 1
    built = session.part("build", build, seconds=1200)
    if built and not args.no_tests:
        session.part("tests", tests, 500.0, seconds=520)
    backends = [name for name in ("cuda", "triton") if name != "cuda" or built]
    for op, name, tokens, routing in plan():
        if not args.shapes or name in args.shapes:
            title = f"{op} {name} T={tokens} {routing}"
            session.part(title, timings, op, name, tokens, routing, args.rounds, backends)
    args.out.with_suffix(".md").write_text(table(session.found) + "\n", encoding="utf-8")
    print(table(session.found))
    return 0 if built else 1


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    sys.exit(main())

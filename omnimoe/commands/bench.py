"""``omnimoe bench``."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from omnimoe.bench.shapes import FULL, MINI, ROUTINGS

MARK = "dense"
OURS = "omnimoe"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    parser.description = (
        "Times a layer of routed experts beside other libraries', in turn and in one process; who errs against float64 "
        "is not timed. On a CPU: shapes of published models cut down to it. On a GPU: those models' own."
    )
    parser.add_argument(
        "--shapes", nargs="+", metavar="NAME", help=f"on a GPU all of {', '.join(FULL)}; on a CPU {', '.join(MINI)}"
    )
    parser.add_argument("--tokens", type=int, metavar="N", help="tokens of every shape, instead of its own")
    parser.add_argument(
        "--dtype", nargs="+", choices=("float32", "bfloat16", "float16"), help="bfloat16; on a CPU float32 too"
    )
    parser.add_argument("--op", choices=("experts_mlp", "grouped_mm"), default="experts_mlp", help="what to time")
    parser.add_argument("--routing", choices=ROUTINGS, default="uniform", help="how tokens fall to experts")
    parser.add_argument("--peers", nargs="+", metavar="NAME", help="loop, torch, transformers, liger; all if left out")
    parser.add_argument("--backends", nargs="+", metavar="NAME", help="of ours to time besides the one it takes itself")
    parser.add_argument("--rounds", type=int, default=7, metavar="N", help="timings of each, in turn")
    parser.add_argument("--threads", type=int, default=1, metavar="N", help="of PyTorch on the CPU")
    parser.add_argument("--device", metavar="DEVICE", help="cpu or cuda; the faster there is if left out")
    parser.add_argument("--no-memory", action="store_true", help="do not measure memory")
    parser.add_argument("--seed", type=int, default=0, help="draws operands and routing")
    parser.add_argument("--out", type=Path, metavar="FILE.json", help="write every number there")
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="draw GFLOP/s by shape there")
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(args: argparse.Namespace) -> int:
    """Measures, prints tables, and fails if our own results are wrong."""
    if args.rounds < 1 or args.threads < 1 or (args.tokens is not None and args.tokens < 1):
        raise ValueError("--rounds, --threads and --tokens must be at least 1")
    import torch
    from rich.console import Console
    from rich.progress import Progress, SpinnerColumn, TextColumn

    from omnimoe.bench.run import bench, named
    from omnimoe.bench.shapes import default_shapes
    from omnimoe.commands._settings import read_device
    from omnimoe.commands._tables import console

    device = str(read_device(args.device or ("cuda" if torch.cuda.is_available() else "cpu")))
    shapes = named(args.shapes or default_shapes(device), args.tokens)
    dtypes = args.dtype or (["bfloat16"] if device.startswith("cuda") else ["float32", "bfloat16"])
    columns, screen = (SpinnerColumn(), TextColumn("{task.description}")), Console(stderr=True)
    with Progress(*columns, transient=True, console=screen, disable=not screen.is_terminal) as progress:
        task = progress.add_task("measuring")
        result = bench(
            shapes,
            dtypes,
            op=args.op,
            device=device,
            routing=args.routing,
            rounds=args.rounds,
            threads=args.threads,
            peers=args.peers,
            backends=args.backends,
            memory=not args.no_memory,
            seed=args.seed,
            on_shape=lambda dtype, name: progress.update(task, description=f"{dtype} {name}"),
        )
    for file in (args.out, args.plot):
        if file is not None:
            file.parent.mkdir(parents=True, exist_ok=True)
    if args.out:
        args.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    if args.plot:
        _draw(result, args.plot)
    wrong = [
        f"{dtype} {name}: {row['not timed'][OURS]}"
        for dtype, rows in result["results"].items()
        for name, row in rows.items()
        if OURS in row["not timed"]
    ]
    if args.json:
        print(json.dumps(result))
    else:
        _tell(result, console())
    if wrong:
        raise RuntimeError(f"our own results were not timed: {'; '.join(wrong)}")
    return 0


def _tell(result: dict[str, Any], screen: Any) -> None:
    """Prints a table for each dtype and kind of work, and what was not timed."""
    from omnimoe.bench.run import mean_ratios
    from omnimoe.commands._tables import plain_table

    versions = ", ".join(f"{name} {told['version']}" for name, told in result["peers"].items() if told["version"])
    print(
        f"{result['op']}, {result['routing']} routing, {result['device']}, {result['threads']} threads, "
        f"{result['rounds']} rounds, CPU kernels {result['CPU kernels']}\n{versions}"
    )
    for dtype, rows in result["results"].items():
        for kind in dict.fromkeys(kind for row in rows.values() for kind in row["work"]):
            having = {name: row for name, row in rows.items() if kind in row["work"]}
            screen.print(f"\n[bold]{dtype}, {kind}[/bold]: GFLOP/s (how many times longer than ours)", highlight=False)
            peers = [peer for peer in (MARK, *result["peers"]) if any(peer in r["work"][kind] for r in having.values())]
            table = plain_table("shape", "rows/expert", *peers, "of dense")
            for name, row in having.items():
                done = row["work"][kind]
                share = done[OURS]["share of dense"] if OURS in done else None
                cells = [_rate(done.get(peer), peer) for peer in peers]
                table.add_row(name, f"{row['rows an expert']:.3g}", *cells, "–" if share is None else f"{share:.2f}")
            means = mean_ratios(result, dtype, kind)
            if len(having) > 1 and means:
                told = [f"({means[peer]:.2f})" if peer in means else "" for peer in peers]
                table.add_row("geometric mean", "", *told, "")
            screen.print(table)
        _tell_memory(rows, list(result["peers"]), dtype, screen)
    reasons = {
        (peer, reason) for rows in result["results"].values() for row in rows.values()
        for peer, reason in row["not timed"].items()
    }  # fmt: skip
    for peer, reason in sorted(reasons):
        screen.print(f"\n{peer} was not timed: {reason}", highlight=False)


def _tell_memory(rows: dict[str, Any], peers: list[str], dtype: str, screen: Any) -> None:
    """Prints what each peer needs beyond its operands, and how far off it is."""
    from omnimoe.commands._tables import plain_table

    there = [peer for peer in peers if any(peer in row["errors"] for row in rows.values())]
    needs, errors = plain_table("shape", *there), plain_table("shape", *there)
    for name, row in rows.items():
        done = list(row["work"].values())[-1]
        peaks = {peer: done.get(peer, {}).get("peak bytes") for peer in there}
        needs.add_row(name, *(_mebibytes(peaks[peer], row["saved bytes"].get(peer)) for peer in there))
        worst = {peer: max(found.values()) for peer, found in row["errors"].items()}
        errors.add_row(name, *(f"{worst[peer]:.1e}" if peer in worst else "–" for peer in there))
    screen.print(f"\n[bold]{dtype}, MiB[/bold]: at once with backward / kept for backward", highlight=False)
    screen.print(needs)
    screen.print(f"\n[bold]{dtype}, largest error[/bold] of value and gradients against float64", highlight=False)
    screen.print(errors)


def _rate(told: dict[str, Any] | None, peer: str) -> str:
    if told is None:
        return "–"
    rate = told["GFLOP/s"]
    shown = f"{rate:.0f}" if rate >= 10 else f"{rate:.1f}"
    return shown if peer in (MARK, OURS) or told["ratio"] is None else f"{shown} ({told['ratio']:.2f})"


def _mebibytes(peak: int | None, saved: int | None) -> str:
    parts = [f"{number / 2**20:.3g}" for number in (peak, saved) if number is not None]
    return " / ".join(parts) or "–"


def _draw(result: dict[str, Any], path: Path) -> None:
    from omnimoe.plots import draw_bars

    results = result["results"]
    labels = list(dict.fromkeys(name for rows in results.values() for name in rows))
    panels = {}
    for dtype, rows in results.items():
        kinds = dict.fromkeys(kind for row in rows.values() for kind in row["work"])
        # what decodes has a forward pass alone, and stands among the others' where there are others
        for kind in [kind for kind in kinds if kind != "decoding"] or kinds:
            everybody = dict.fromkeys((MARK, OURS, *result["peers"]))
            heights = {peer: [_height(rows[name]["work"], kind, peer) for name in labels] for peer in everybody}
            panels[f"{dtype}, {kind}"] = {peer: found for peer, found in heights.items() if any(found)}
    title = f"{result['op']}, {result['routing']} routing, {result['device']}"
    draw_bars(panels, labels, path, ylabel="GFLOP/s", mark=MARK, title=title)


def _height(work: dict[str, Any], kind: str, peer: str) -> float | None:
    found = work.get(kind) or (work.get("decoding") if kind == "forward" else None) or {}
    return found[peer]["GFLOP/s"] if peer in found else None

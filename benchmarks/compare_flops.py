"""The architectures of one comparison at equal FLOPs a token: towers, modality experts, mixtures, state spaces.

    python benchmarks/compare_flops.py --out compared                  # trains what is left of the plan
    python benchmarks/compare_flops.py --out compared --list           # what is finished, running and left
    python benchmarks/compare_flops.py --out compared --only pico mot_nano
    python benchmarks/compare_flops.py --out compared --time           # seconds a step, on a machine with nothing else
    python benchmarks/compare_flops.py --out compared --save DATE      # JSON and curves into benchmarks/results
    python benchmarks/compare_flops.py --table                         # the tables of what was saved
    python benchmarks/compare_flops.py --write docs/comparison.md      # the same, into the page

A run is a size, an architecture and a seed. Each finished one is kept as a file, a killed one is taken up at its last
checkpoint, and several processes started with the same line share the work. One process takes one thread.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks import compare_tables
from omnimoe.compare import ARCHITECTURES, Comparison, Run, baselines_of, claimed, seconds_per_step, train_run
from omnimoe.data import Corpus
from omnimoe.plots import draw_curves, draw_shares
from omnimoe.train import TrainSettings

RESULTS = Path(__file__).parent / "results"
SEEDS = (0, 1, 2)


def short_run(steps: int, **changes: Any) -> TrainSettings:
    """Settings that all sizes share, but for their length."""
    return TrainSettings(
        **{
            "steps": steps,
            "batch_size": 8,
            "sequence_length": 256,
            "learning_rate": 3e-3,
            "warmup": 40,
            "text_share": 0.1,
            "evaluate_every": steps // 20,
            "evaluate_batches": 6,
            "save_every": steps // 4,
            "keep": 1,
            **changes,
        }
    )


@dataclass(frozen=True)
class Size:
    """How the models of one size are trained, and where."""

    settings: TrainSettings
    device: str = "cpu"


SIZES = {
    "pico": Size(short_run(400)),
    "nano": Size(short_run(240, evaluate_every=15)),
    "micro": Size(short_run(120, evaluate_every=10)),
    "small": Size(
        short_run(4000, batch_size=128, learning_rate=1e-3, warmup=200, evaluate_batches=16, save_every=500),
        device="cuda",
    ),
}
"""Three sizes that a processor trains, and one for a GPU, which was not run here."""


def names_of(size: str) -> list[str]:
    """Zoo names of a size, the baseline first."""
    return [f"{name}_{size}" for name in ARCHITECTURES]


def planned(sizes: list[str], only: list[str], num_seeds: int) -> list[tuple[str, str, int]]:
    """Size, model and seed of every run, in the order in which they are trained.

    Args:
        sizes: of :data:`SIZES`.
        only: names of models, of architectures or of sizes; empty for all.
        num_seeds: how many of the seeds.
    """
    runs = []
    for size in sizes:
        names = names_of(size)
        wanted = [name for name in names if not only or {name, name.removesuffix(f"_{size}"), size} & set(only)]
        for slow in (False, True):
            chosen = [name for name in wanted if ("mamba" in name) == slow]
            runs += [(size, name, seed) for seed in range(num_seeds) for name in chosen]
    return runs


def folder_of(out: Path, size: str, name: str, seed: int) -> Path:
    """Where a run is kept."""
    return out / size / f"{name}-seed{seed}"


def train(out: Path, runs: list[tuple[str, str, int]]) -> None:
    """Trains what is left, but for what other processes are at.

    Raises:
        SystemExit: at the end, if a run failed; the others are trained first.
    """
    corpora: dict[str, Corpus] = {}
    failed = []
    for size, name, seed in runs:
        settings, folder = SIZES[size].settings.replace(seed=seed), folder_of(out, size, name, seed)
        if settings.data not in corpora:
            corpora[settings.data] = Corpus.load(settings.data)
        with claimed(folder) as is_held:
            if not is_held or Run.load(folder) is not None:
                continue
            try:
                run = train_run(
                    name,
                    settings,
                    corpus=corpora[settings.data],
                    folder=folder,
                    resume=True,
                    keep_weights=False,
                    device=SIZES[size].device,
                    show_progress=False,
                )
            except (RuntimeError, ValueError, OSError) as error:
                failed.append(f"{folder}: {error}")
                print(failed[-1], file=sys.stderr, flush=True)
                continue
        history = run.history
        print(f"{name} seed {seed}: {history.seconds:.0f} s, loss {history.held_out['all'][-1]:.4f}", flush=True)
    if failed:
        raise SystemExit(f"{len(failed)} of {len(runs)} runs failed; the same command tries them again")


def status(out: Path, runs: list[tuple[str, str, int]]) -> dict[str, list[str]]:
    """Which runs are finished, which a process is at, and which are left."""
    found: dict[str, list[str]] = {"finished": [], "running": [], "left": []}
    for size, name, seed in runs:
        folder = folder_of(out, size, name, seed)
        if Run.load(folder) is not None:
            kind = "finished"
        elif not folder.is_dir():
            kind = "left"
        else:
            with claimed(folder) as is_free:
                kind = "left" if is_free else "running"
        found[kind].append(folder.name)
    return found


def gather(out: Path, size: str) -> Comparison:
    """What is finished of a size."""
    names = names_of(size)
    comparison = Comparison(
        names=names, seeds=list(SEEDS), settings=SIZES[size].settings, baselines=baselines_of(names)
    )
    for name in names:
        for seed in SEEDS:
            run = Run.load(folder_of(out, size, name, seed))
            if run is not None:
                comparison.add(run)
    return comparison


def clock(out: Path, sizes: list[str], only: list[str], rounds: int) -> None:
    """Times a step of each model beside its baseline's, in turns, and keeps what it finds."""
    for size in sizes:
        path, names, settings = out / size / "times.json", names_of(size), SIZES[size].settings
        kept = json.loads(path.read_text()) if path.exists() else {}
        corpus = Corpus.load(settings.data)
        for _, name, _ in planned([size], only, 1):
            base = baselines_of(names).get(name, names[0])
            if name == base or name in kept:
                continue
            kept[name] = seconds_per_step(name, base, settings, corpus=corpus, rounds=rounds, device=SIZES[size].device)
            print(f"{name}: {kept[name]['seconds']:.3f} s, {kept[name]['ratio']:.2f} times {base}", flush=True)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(kept) + "\n")


def save(out: Path, size: str, folder: Path, date: str) -> list[Path]:
    """Writes curves and tables of a size as JSON and two pictures; nothing where nothing is finished."""
    comparison = gather(out, size)
    if not any(comparison.histories.values()):
        return []
    times = out / size / "times.json"
    plain = comparison.to_dict() | {"size": size, "planned": comparison.names}
    plain["times"] = json.loads(times.read_text()) if times.exists() else {}
    for runs in plain["histories"].values():
        for run in runs:
            run |= {"train_steps": [], "train": {}}  # the held-out curves are what is compared
    stem = folder / f"{date}-compare-flops-{size}"
    paths = [stem.with_suffix(".json"), stem.with_suffix(".png"), stem.with_name(f"{stem.name}-shares.png")]
    paths[0].write_text(json.dumps(compare_tables.rounded(plain)) + "\n")
    groups = {title: [f"{name}_{size}" for name in names] for title, names in compare_tables.PANELS.items()}
    draw_curves(comparison, paths[1], groups=groups)
    draw_shares(comparison.rows(), comparison.modalities, paths[2], title=f"{size}: share of the baseline's steps")
    return paths


def latest(folder: Path) -> dict[str, dict[str, Any]]:
    """The newest saved result of each size."""
    found = {size: sorted(folder.glob(f"*-compare-flops-{size}.json")) for size in SIZES}
    return {size: {**json.loads(held[-1].read_text()), "stem": held[-1].stem} for size, held in found.items() if held}


def main(arguments: list[str] | None = None) -> None:
    """Trains, lists, times, saves or tells, as the options say."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="folder of the runs")
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=["pico", "nano", "micro"])
    parser.add_argument("--only", nargs="+", default=[], help="models, architectures or sizes")
    parser.add_argument("--seeds", type=int, default=len(SEEDS), help="how many of each")
    parser.add_argument("--list", action="store_true", help="say what is finished, running and left")
    parser.add_argument("--time", action="store_true", help="time steps in turns")
    parser.add_argument("--rounds", type=int, default=9, help="of --time")
    parser.add_argument("--save", metavar="DATE", help="write results under this date")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of --save and --table")
    parser.add_argument("--table", action="store_true", help="print the tables of what was saved")
    parser.add_argument("--write", type=Path, metavar="PAGE", help="put them between the marks of a page")
    args = parser.parse_args(arguments)
    if not args.table and args.write is None and args.out is None:
        parser.error("give --out, the folder of the runs")
    torch.set_num_threads(1)
    if args.out is not None:
        runs = planned(args.sizes, args.only, args.seeds)
        if args.list:
            for kind, names in status(args.out, runs).items():
                print(f"{kind:<9}{len(names):>4}  {' '.join(names)}")
        elif args.time:
            clock(args.out, args.sizes, args.only, args.rounds)
        elif args.save:
            for size in args.sizes:
                for path in save(args.out, size, args.results, args.save):
                    print(path)
        elif not args.table and args.write is None:
            train(args.out, runs)
    if args.table:
        print(compare_tables.page(latest(args.results), len(SEEDS)))
    if args.write is not None:
        compare_tables.write(args.write, compare_tables.page(latest(args.results), len(SEEDS)))


if __name__ == "__main__":
    main()

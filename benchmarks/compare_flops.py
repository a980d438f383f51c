"""The architectures of one comparison at equal FLOPs a token: towers, modality experts, mixtures, state spaces.

    python benchmarks/compare_flops.py --out compared                  # trains what is left of the plan
    python benchmarks/compare_flops.py --out compared --list           # what is finished, running and left
    python benchmarks/compare_flops.py --out compared --only pico mot_nano
    python benchmarks/compare_flops.py --out compared --time           # seconds a step, on a machine with nothing else
    python benchmarks/compare_flops.py --out compared --save DATE      # JSON and curves into benchmarks/results
    python benchmarks/compare_flops.py --table                         # the tables of docs/comparison.md

A run is a size, an architecture and a seed. Each finished one is kept as a file, a killed one is taken up at its last
checkpoint, and several processes started with the same line share the work. One process takes one thread.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from omnimoe.compare import ARCHITECTURES, Run, claimed, train_run
from omnimoe.data import Corpus
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
    """Models of one size: groups of names, each measured in the steps of its first, and how they are trained."""

    groups: tuple[tuple[str, ...], ...]
    settings: TrainSettings
    device: str = "cpu"


def of_plan(size: str, settings: TrainSettings) -> Size:
    """Every architecture at a size of ours; state spaces last, whose scan takes a processor longest."""
    return Size((tuple(f"{name}_{size}" for name in ARCHITECTURES),), settings)


SIZES = {
    "pico": of_plan("pico", short_run(400)),
    "nano": of_plan("nano", short_run(240)),
    "micro": of_plan("micro", short_run(120)),
    "94m": Size(
        (
            ("chameleon_94m", "mot_94m", "moe4x_94m"),
            ("chameleon_90m", "moma_90m_1t1i", "moma_90m_2t2i", "moma_90m_4t4i", "moe_90m_8x"),
            ("mamba_94m", "mixture_of_mamba_94m"),
        ),
        short_run(4000, batch_size=32, sequence_length=1024, learning_rate=1e-3, warmup=200, evaluate_batches=16),
        device="cuda",
    ),
}
"""Three sizes that a processor trains, and one for a GPU, which is of the published sizes and was not run here."""


def planned(sizes: list[str], only: list[str], num_seeds: int) -> list[tuple[str, str, int]]:
    """Size, model and seed of every run, in the order in which they are trained.

    Args:
        sizes: of :data:`SIZES`.
        only: names of models, of architectures or of sizes; empty for all.
        num_seeds: how many of the seeds.
    """
    runs = []
    for size in sizes:
        names = [name for group in SIZES[size].groups for name in group]
        wanted = [name for name in names if not only or {name, name.removesuffix(f"_{size}"), size} & set(only)]
        for slow in (False, True):
            chosen = [name for name in wanted if ("mamba" in name) == slow]
            runs += [(size, name, seed) for seed in range(num_seeds) for name in chosen]
    return runs


def folder_of(out: Path, size: str, name: str, seed: int) -> Path:
    """Where a run is kept."""
    return out / size / f"{name}-seed{seed}"


def train(out: Path, runs: list[tuple[str, str, int]]) -> None:
    """Trains what is left, but for what other processes are at."""
    corpora: dict[str, Corpus] = {}
    for size, name, seed in runs:
        settings, folder = SIZES[size].settings.replace(seed=seed), folder_of(out, size, name, seed)
        corpus = corpora.setdefault(settings.data, Corpus.load(settings.data))
        with claimed(folder) as is_held:
            if not is_held or Run.load(folder) is not None:
                continue
            run = train_run(
                name,
                settings,
                corpus=corpus,
                folder=folder,
                resume=True,
                keep_weights=False,
                device=SIZES[size].device,
                show_progress=False,
            )
        history = run.history
        print(f"{name} seed {seed}: {history.seconds:.0f} s, loss {history.held_out['all'][-1]:.4f}", flush=True)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="folder of the runs")
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=["pico", "nano", "micro"])
    parser.add_argument("--only", nargs="+", default=[], help="models, architectures or sizes")
    parser.add_argument("--seeds", type=int, default=len(SEEDS))
    args = parser.parse_args(arguments)
    torch.set_num_threads(1)
    train(args.out, planned(args.sizes, args.only, args.seeds))


if __name__ == "__main__":
    main()

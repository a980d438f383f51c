"""Whether an upcycled model beats the same architecture from scratch, at equal FLOPs in all, the seed's counted.

A dense seed is trained, grown into experts by modality and trained on: optimizer and schedule anew, the data going on.
The same architecture is trained from fresh weights on the same data for as many steps as the same FLOPs allow. Each of
the three has a whole schedule of its own.

    python benchmarks/upcycle_flops.py --seed-steps 200 --steps 400 --seeds 3 --out result.json --runs runs

With ``--runs`` a seed that is finished is read again, and one that was killed goes on at its last checkpoint; processes
started with the same line share the seeds, and the last to end writes the result. One process takes one thread.
"""

from __future__ import annotations

import argparse
import json
import platform
import shutil
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

import omnimoe
from omnimoe import OmniMoeForCausalLM, load, upcycle
from omnimoe.compare import claimed, spread
from omnimoe.data import Corpus
from omnimoe.flops import flops
from omnimoe.routers import ExpertChoiceRouter
from omnimoe.train import History, Training, TrainSettings

WAYS: dict[str, dict[str, Any]] = {
    "experts": {"experts": {"text": 4, "image": 4, "speech": 4}},
    "moma": {
        "experts": {"text": 4, "image": 4, "speech": 4},
        "router": ExpertChoiceRouter.Config(gumbel_noise=1.0),
    },
    "towers": {"towers": "modality"},
}
"""Token choice of two, MoMa's expert choice of one, and towers without experts."""


def trained(
    model: OmniMoeForCausalLM, settings: TrainSettings, corpus: Corpus, out: Path, *, follows: Path | None = None
) -> History:
    """A run, on the data after another's where ``follows`` names it; what was broken off goes on."""
    run = Training(model, settings, corpus=corpus, out=out, name=out.name, show_progress=False)
    if (out / "checkpoint").is_dir():
        run.resume()
    elif follows is not None:
        run.follow(follows / "checkpoint")
    history = run.run()
    if run.was_interrupted:
        raise KeyboardInterrupt
    return history


def compare(args: argparse.Namespace, corpus: Corpus, seed: int, folder: Path) -> dict[str, Any]:
    """The three runs of one random seed: curves over training FLOPs, forward and backward."""
    changes = {"num_layers": args.num_layers} if args.num_layers else {}
    shared = TrainSettings(
        data=args.data,
        batch_size=args.batch_size,
        sequence_length=args.sequence_length,
        learning_rate=args.lr,
        evaluate_batches=args.evaluate_batches,
        evaluate_every=args.evaluate_every,
        text_share=args.text_share,
        precision=args.precision,
        save_every=max(1, args.steps // 4),
        keep=1,
        steps=args.seed_steps,
        warmup=min(args.warmup, args.seed_steps),
        seed=seed,
    )
    first = load(args.model, seed=seed, **changes)
    before = trained(first, shared, corpus, folder / "seed")
    grown, report = upcycle(first.eval(), rng_seed=seed, return_report=True, **WAYS[args.way])
    batch = Training(first, shared, corpus=corpus, show_progress=False).held_out[0]
    costs = [3 * flops(model, batch).per_token * shared.tokens_per_step for model in (first, grown)]
    fresh = load(args.model, seed=seed, **{**changes, **_parts(grown)})
    budget = args.seed_steps * costs[0] + args.steps * costs[1]
    settings = shared.replace(steps=args.steps, warmup=min(args.warmup, args.steps))
    after = trained(grown, settings, corpus, folder / "upcycled", follows=folder / "seed")
    whole = shared.replace(steps=max(1, round(budget / costs[1])), warmup=args.warmup)
    scratch = trained(fresh, whole, corpus, folder / "scratch")
    curves = {
        "seed": _curve(before, 0.0, costs[0]),
        "upcycled": _curve(after, args.seed_steps * costs[0], costs[1]),
        "scratch": _curve(scratch, 0.0, costs[1]),
    }
    return {
        "seed": seed,
        "is_preserved": report.is_preserved,
        "report": report.complaint,
        "flops": {"budget": budget, "scratch": whole.steps * costs[1]},
        "steps": {"seed": args.seed_steps, "upcycled": args.steps, "scratch": whole.steps},
        "seconds": {"seed": before.seconds, "upcycled": after.seconds, "scratch": scratch.seconds},
        "curves": curves,
    }


def _parts(model: OmniMoeForCausalLM) -> dict[str, Any]:
    names = ("attention", "experts", "norm", "final_norm", "layers")
    return {name: getattr(model.config, name) for name in names}


def _curve(history: History, before: float, cost: float) -> dict[str, Any]:
    return {"flops": [before + step * cost for step in history.steps], "held_out": history.held_out}


def kept(args: argparse.Namespace, corpus: Corpus, seed: int, folder: Path) -> dict[str, Any] | None:
    """The runs of one random seed, read where they are finished; None where another process is at them.

    Raises:
        ValueError: if the folder holds runs of other arguments.
    """
    asked = {name: held for name, held in vars(args).items() if name not in ("out", "runs", "seeds")}
    path = folder / "result.json"
    with claimed(folder) as is_held:
        if not is_held:
            return None
        if path.exists():
            plain = json.loads(path.read_text())
            changed = [name for name in asked if plain["arguments"].get(name) != asked[name]]
            if changed:
                raise ValueError(f"{path} was made with another {', '.join(changed)}; take another --runs")
            return plain
        found = compare(args, corpus, seed, folder) | {"arguments": asked}
        fresh = path.with_suffix(".new")
        fresh.write_text(json.dumps(found) + "\n")
        fresh.replace(path)
        for weights in folder.glob("*/checkpoint*"):
            shutil.rmtree(weights)
        return found


def main(arguments: list[str] | None = None) -> None:
    """Runs all seeds, prints the losses at the end, and says who was lower."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--way", choices=WAYS, default="experts")
    parser.add_argument("--model", default="dense_nano", help="the dense seed")
    parser.add_argument("--num-layers", type=int, help="of it, if not as many as it has")
    parser.add_argument("--data", default="p")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--seed-steps", type=int, default=200)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--warmup", type=int, default=40)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--sequence-length", type=int, default=256)
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--text-share", type=float, default=0.1)
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="bf16")
    parser.add_argument("--evaluate-every", type=int, default=25)
    parser.add_argument("--evaluate-batches", type=int, default=8)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--runs", type=Path, help="folder in which runs are kept and taken up")
    args = parser.parse_args(arguments)
    torch.set_num_threads(1)
    corpus = Corpus.load(args.data)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) if args.runs is None else args.runs
        every = [kept(args, corpus, seed, folder / f"{args.model}-{args.way}-seed{seed}") for seed in range(args.seeds)]
    runs = [run for run in every if run is not None]
    if len(runs) < len(every):
        print(f"{len(every) - len(runs)} of {len(every)} seeds are with another process, which writes the result")
        return
    result: dict[str, Any] = {
        "date": time.strftime("%Y-%m-%d"),
        "arguments": {name: held for name, held in vars(args).items() if name not in ("out", "runs")},
        "omnimoe": omnimoe.__version__,
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "machine": platform.processor() or platform.machine(),
        "corpus": corpus.meta["rows_sha256"][:12],
        "runs": runs,
        "final": {},
    }
    print(f"{'held out':<10}{'upcycled':>12}{'scratch':>12}{'difference, 95 % interval':>28}")
    for name in runs[0]["curves"]["scratch"]["held_out"]:
        ends = [[run["curves"][kind]["held_out"][name][-1] for run in runs] for kind in ("upcycled", "scratch")]
        gap = spread([one - other for one, other in zip(*ends, strict=True)])
        result["final"][name] = {"upcycled": ends[0], "scratch": ends[1], "gap": gap}
        means = [statistics.mean(held) for held in ends]
        half = "" if gap is None or gap["half"] is None else f" ± {gap['half']:.4f}"
        print(f"{name:<10}{means[0]:>12.4f}{means[1]:>12.4f}{means[0] - means[1]:>+19.4f}{half}")
    steps = runs[0]["steps"]
    print(
        f"{args.way}: {steps['seed']} steps of the seed and {steps['upcycled']} upcycled, beside {steps['scratch']} "
        f"from scratch, {runs[0]['flops']['budget']:.3g} and {runs[0]['flops']['scratch']:.3g} FLOPs"
    )
    if args.out is not None:
        args.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()

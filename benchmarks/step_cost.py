"""What modality towers cost beside one shared copy, at equal active FLOPs: forward, forward and backward, whole step.

Both models see the same interleaved tokens of the shipped corpus in one process, in turn. The result is a ratio of
medians; before anything is timed, a Mixture-of-Transformers with equal towers must give the dense model's logits.

    python benchmarks/step_cost.py --models dense_micro mot_micro --tokens 4096
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch

from omnimoe import load
from omnimoe.data import Corpus
from omnimoe.flops import flops
from omnimoe.train import TrainSettings, make_optimizer, training_batches


def check_equal_towers(dense, towers, batch) -> float:
    """Copies the dense weights into every tower and returns the largest difference of logits; raises if it is large."""
    with torch.no_grad():
        source = dense.state_dict()
        state = {name: source[name].expand_as(value).contiguous() for name, value in towers.state_dict().items()}
        kept = {name: value.clone() for name, value in towers.state_dict().items()}
        towers.load_state_dict(state)
        difference = float((dense(**batch).logits - towers(**batch).logits).abs().max())
        towers.load_state_dict(kept)
    if difference > 1e-3:
        raise SystemExit(f"equal towers differ from the dense model by {difference:.2e}; nothing is timed")
    return difference


def measure(works: dict[str, Callable[[], None]], rounds: int) -> dict[str, list[float]]:
    """Seconds of every round of every piece of work, in turn, after one round that does not count."""
    seconds: dict[str, list[float]] = {name: [] for name in works}
    for round_ in range(rounds + 1):
        for name, work in works.items():
            started = time.perf_counter()
            work()
            if round_:
                seconds[name].append(time.perf_counter() - started)
    return seconds


def main() -> None:
    """Runs the benchmark and prints a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", default=["dense_micro", "mot_micro"], help="the baseline first")
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--sequence-length", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", type=Path, help="write the result as JSON")
    args = parser.parse_args()
    if args.tokens % args.sequence_length:
        raise SystemExit(f"--tokens {args.tokens} must be a multiple of --sequence-length {args.sequence_length}")
    torch.set_num_threads(args.threads)

    corpus = Corpus.load("p")
    settings = TrainSettings(batch_size=args.tokens // args.sequence_length, sequence_length=args.sequence_length)
    models = {name: load(name, seed=0) for name in args.models}
    base = args.models[0]
    batch = next(training_batches(models[base].config, settings, corpus))
    for name in args.models[1:]:
        if set(models[name].state_dict()) != set(models[base].state_dict()):
            raise SystemExit(f"{name} has other weights than {base} with copies, so nothing shows that they are twins")
        difference = check_equal_towers(models[base], models[name], batch)
        print(f"{name} with equal towers: largest difference of logits {difference:.1e}")

    def forward(model) -> None:
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=args.precision == "bf16"):
            model(**batch)

    def backward(model) -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=args.precision == "bf16"):
            loss = model(**batch).loss
        loss.backward()
        model.zero_grad(set_to_none=True)

    optimizers = {name: make_optimizer(model, settings) for name, model in models.items()}

    def step(name: str) -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=args.precision == "bf16"):
            loss = models[name](**batch).loss
        loss.backward()
        optimizers[name].step()
        optimizers[name].zero_grad(set_to_none=True)

    result = {
        "date": time.strftime("%Y-%m-%d"),
        "torch": torch.__version__,
        "machine": platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "tokens": args.tokens,
        "sequence_length": args.sequence_length,
        "precision": args.precision,
        "flops_per_token": {name: flops(model, batch).per_token for name, model in models.items()},
        "work": {},
    }
    kinds = {
        "forward": {name: lambda model=model: forward(model) for name, model in models.items()},
        "forward and backward": {name: lambda model=model: backward(model) for name, model in models.items()},
        "step with AdamW": {name: lambda name=name: step(name) for name in models},
    }
    print(f"{args.tokens} tokens, {args.precision}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    print(f"{'':22}" + "".join(f"{name:>24}" for name in models))
    for kind, works in kinds.items():
        seconds = measure(works, args.rounds)
        medians = {name: statistics.median(found) for name, found in seconds.items()}
        ratios = {
            name: statistics.median(a / b for a, b in zip(found, seconds[base], strict=True))
            for name, found in seconds.items()
        }
        result["work"][kind] = {"seconds": seconds, "median": medians, "ratio": ratios}
        print(f"{kind:22}" + "".join(f"{medians[name] * 1e3:>14.0f} ms {ratios[name]:>5.3f}x" for name in models))
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()

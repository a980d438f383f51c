"""``omnimoe compare``."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from omnimoe.commands._settings import add_settings, read_device, read_settings

DEFAULTS = {"steps": 600, "evaluate_every": 25}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    parser.add_argument(
        "models", nargs="+", help="zoo names, the baseline first; 'dense mot' means those of --size, 'all' every one"
    )
    parser.add_argument("--size", default="nano", help="size that short names are completed with")
    parser.add_argument("--seeds", type=int, default=3, help="how many seeds each model is trained with")
    parser.add_argument("--out", type=Path, default=Path("omnimoe-compare"), help="folder for curves, tables and runs")
    parser.add_argument(
        "--resume", action="store_true", help="read the finished runs of --out and go on with the others"
    )
    parser.add_argument("--device", default="cpu", help="where to train, such as cuda")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    add_settings(parser, without=("seed", "freeze"), **DEFAULTS)


def run(args: argparse.Namespace) -> int:
    """Trains every model with every seed and prints the table."""
    from omnimoe.commands._tables import comparison_table, console
    from omnimoe.compare import LOOKS_AHEAD, compare, resolve_names
    from omnimoe.routing_load import draw_model_routing
    from omnimoe.train import Training, TrainSettings

    settings = read_settings(args, TrainSettings(**DEFAULTS))
    names = resolve_names(args.models, args.size)

    def draw(name: str, seed: int, training: Training) -> None:
        draw_model_routing(training.model, training.held_out, args.out / f"routing-{name}.png", title=name)

    comparison = compare(
        names,
        settings,
        seeds=range(args.seeds),
        out=args.out,
        resume=args.resume,
        device=read_device(args.device),
        on_model=draw,
    )
    if args.json:
        print(json.dumps(comparison.to_dict()))
        return 0
    rows = comparison.rows()
    console().print(comparison_table(rows, comparison.modalities))
    measured = ", ".join(f"{name} in those of {base}" for name, base in comparison.baselines.items())
    print(
        f"\nsteps: share of {names[0]}'s steps that a model needs to reach its held-out loss, mean ± half the "
        f"95 % interval over {args.seeds} seeds{'; ' * bool(measured)}{measured}\n"
        f"FLOPs/token: forward, in sequences of {settings.sequence_length}"
    )
    if any(row["scored"] == LOOKS_AHEAD for row in rows):
        print(
            "looks ahead: experts chose among later tokens too; causal: every token was routed by itself, as it is "
            "when the model generates"
        )
    print(
        f"curves  {args.out / 'curves.png'}\nrouting {args.out / 'routing-MODEL.png'}\n"
        f"numbers {args.out / 'comparison.json'}"
    )
    return 0

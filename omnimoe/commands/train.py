"""``omnimoe train``."""

from __future__ import annotations

import argparse
from pathlib import Path

from omnimoe.commands._settings import add_settings, read_device, read_settings


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    parser.add_argument("model", help="a name of the zoo, or a JSON file that declares a model")
    parser.add_argument("--out", type=Path, required=True, help="folder for the checkpoint and the log")
    parser.add_argument("--resume", action="store_true", help="go on where the checkpoint in --out left off")
    parser.add_argument("--device", default="cpu", help="where to train, such as cuda")
    add_settings(parser)


def run(args: argparse.Namespace) -> int:
    """Trains, and says where the checkpoint is and how to go on."""
    from omnimoe.hub import add_model_config, load
    from omnimoe.train import Training, TrainSettings, load_settings
    from omnimoe.train.checkpoint import restore

    if restore(args.out / "checkpoint") and not args.resume:
        raise ValueError(f"{args.out} holds a checkpoint already; pass --resume to go on, or another --out")
    settings = read_settings(args, load_settings(args.out / "checkpoint") if args.resume else TrainSettings())
    name = args.model
    if name.endswith(".json"):
        if not Path(name).is_file():
            raise ValueError(f"no file {name}; pass a name of the zoo or a JSON file that declares a model")
        name = add_model_config(name)
    device = read_device(args.device)
    training = Training(load(name, seed=settings.seed).to(device), settings, out=args.out, name=name)
    if args.resume:
        training.resume()
    if not training.model.config.is_causal:
        print("note: tokens of this model see later tokens, so next-token losses are not those of a generator")
    history = training.run()
    last = {modality: losses[-1] for modality, losses in history.held_out.items()}
    print(f"checkpoint  {training.checkpoint_folder}")
    print(f"log         {args.out / 'log.jsonl'}, and for TensorBoard {args.out / 'tensorboard'}")
    if last:
        print("held out    " + ", ".join(f"{name} {loss:.3f}" for name, loss in last.items()) + " nats a token")
    if training.was_interrupted:
        print(f"stopped at step {training.step} of {settings.steps}; the same command with --resume goes on")
        return 130
    return 0

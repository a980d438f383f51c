"""``omnimoe train``, on one process or on those that torchrun starts."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from omnimoe.commands._settings import add_settings, read_device, read_settings
from omnimoe.commands._upcycle import add_upcycling, check_options, checkpoint_of, grown


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    parser.add_argument("model", nargs="?", help="a name of the zoo, or a JSON file that declares a model")
    parser.add_argument("--out", type=Path, required=True, help="folder for the checkpoints and the log")
    parser.add_argument("--resume", action="store_true", help="go on where the newest checkpoint in --out left off")
    parser.add_argument(
        "--auto-resume",
        action="store_true",
        help="go on if --out holds a checkpoint, else start; a run that torchrun restarts does so anyway",
    )
    parser.add_argument("--device", default="cpu", help="where to train, such as cuda")
    parser.add_argument(
        "--timeout", type=float, default=600.0, help="seconds to wait for other processes before giving them up"
    )
    add_upcycling(parser)
    add_settings(parser)


def run(args: argparse.Namespace) -> int:
    """Trains, and says where the checkpoint is and how to go on."""
    from omnimoe.train import joined

    with joined(read_device(args.device), timeout=args.timeout) as device:
        return _train(args, device)


def _train(args: argparse.Namespace, device) -> int:
    from omnimoe.auxiliary import add_auxiliary_routers
    from omnimoe.data import Corpus
    from omnimoe.train import Training, TrainSettings, load_settings
    from omnimoe.train.checkpoint import load_checkpoint, restore

    check_options(args)
    folder = args.out / "checkpoint"
    resume, is_there = args.resume, restore(folder)
    if args.auto_resume or int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")):
        resume = resume or is_there
    if is_there and not resume:
        raise ValueError(f"{args.out} holds a checkpoint already; pass --resume to go on, or another --out")
    seed = None if args.source is None else checkpoint_of(args.source)
    # a seed's data go on where they were, so they are read as they were
    base = load_settings(folder if resume else seed) if resume or seed is not None else TrainSettings()
    if not resume:
        held = {"freeze": ""} if getattr(args, "stage", "") == "auxiliary" else {}
        base = base.replace(stage="whole", auxiliary_threshold="set", **held)
    settings = read_settings(args, base)
    if settings.stage == "auxiliary" and args.source is None:
        raise ValueError("--stage auxiliary is for a model that is trained; name it with --from RUN")
    corpus, told = Corpus.load(settings.data), ""
    if args.source is None:
        model, name = _declared(args.model, settings.seed)
    elif resume:
        model, name = load_checkpoint(folder)[0], args.out.name
    else:
        (model, told), name = grown(args, corpus), args.out.name
        if settings.stage == "auxiliary":
            model, told = add_auxiliary_routers(model), f"{told}, and auxiliary routers, which alone are trained"
    training = Training(model.to(device), settings, corpus=corpus, out=args.out, name=name)
    if resume:
        training.resume()
    elif seed is not None and not args.fresh_data:
        training.follow(seed)
    if training.processes.is_first and told:
        step = training.step_of_seed
        place = f"go on where step {step} of the seed's run left them" if step else "start at the front"
        print(f"seed        {args.source}: {told}")
        print(f"data        {place}; optimizer and schedule start anew")
    if training.processes.is_first and not training.model.config.is_causal:
        print("note: tokens of this model see later tokens, so next-token losses are not those of a generator")
    history = training.run()
    if training.processes.is_first:
        _report(training, history, args.out)
    return 130 if training.was_interrupted else 0


def _declared(name: str, seed: int):
    """A model by name or by file, with fresh weights."""
    from omnimoe.hub import add_model_config, load

    if name.endswith(".json"):
        if not Path(name).is_file():
            raise ValueError(f"no file {name}; pass a name of the zoo or a JSON file that declares a model")
        name = add_model_config(name)
    return load(name, seed=seed), name


def _report(training, history, out: Path) -> None:
    print(f"checkpoint  {training.checkpoint_folder}")
    print(f"log         {out / 'log.jsonl'}, and for TensorBoard {out / 'tensorboard'}")
    for told, found in (("", history.held_out), (", every token routed by itself", history.causal)):
        if found:
            losses = ", ".join(f"{name} {values[-1]:.3f}" for name, values in found.items())
            print(f"held out    {losses} nats a token{told}")
    if training.was_interrupted:
        steps = training.settings.steps
        print(f"stopped at step {training.step} of {steps}; the same command with --resume goes on")

"""``omnimoe eval``."""

from __future__ import annotations

import argparse
import itertools
import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omnimoe.commands._model import by_modality, default_device, read_model

if TYPE_CHECKING:
    from omnimoe.evaluate.run import Evaluation
    from omnimoe.model import OmniMoeForCausalLM


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    parser.add_argument(
        "models",
        nargs="+",
        metavar="NAME|DIR",
        help="zoo names with weights, or folders of saved models; LABEL=DIR names the column",
    )
    parser.add_argument("--data", default="p", help="a shipped corpus, or a folder of 'omnimoe data build'")
    parser.add_argument(
        "--raw",
        type=Path,
        metavar="DIR",
        help="folder with the pictures and clips behind --data, if it is not that folder itself; without one, what "
        "tokens decode to stands for them",
    )
    parser.add_argument("--split", default="test", help="val, test, drawing or train")
    parser.add_argument("--metrics", nargs="+", metavar="NAME", help="which; all if left out")
    parser.add_argument("--num", default="100", metavar="N", help="concepts that each metric uses, or 'all'")
    parser.add_argument(
        "--candidates", type=int, nargs="+", default=[4, 10], metavar="N", help="sizes of the sets to choose from"
    )
    parser.add_argument("--out", type=Path, default=Path("omnimoe-eval"), metavar="DIR", help="folder for the report")
    parser.add_argument("--seed", type=int, default=0, help="draws concepts, candidates and samples")
    parser.add_argument(
        "--sampling",
        choices=("even", "saved"),
        default="even",
        help="of pictures and speech: even is all models alike, saved is each as it was saved to be, as in generate",
    )
    number, whole = by_modality(float), by_modality(int)
    parser.add_argument(
        "--temperature", type=number, metavar="X", help="of pictures and speech, or image=X,speech=Y; not 0.9 and 0.8"
    )
    parser.add_argument(
        "--top-k", type=whole, metavar="K", help="of pictures and speech, or image=K,speech=L; not 100 and 50"
    )
    parser.add_argument(
        "--guidance", type=number, metavar="X", help="of pictures, or image=X,speech=Y; 1 is none, as if left out"
    )
    parser.add_argument(
        "--best-of",
        type=whole,
        metavar="N",
        help="of pictures, or image=N,speech=M: keep the one of N under which the model finds the prompt likeliest",
    )
    parser.add_argument("--batch-size", type=int, default=16, metavar="N", help="sequences, pictures or clips at once")
    parser.add_argument("--untrained", action="store_true", help="evaluate zoo names without weights too, fresh")
    parser.add_argument("--device", metavar="DEVICE", help="such as cpu or cuda; the fastest there is if left out")
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(args: argparse.Namespace) -> int:
    """Evaluates, prints a table for each metric, and says where the report is."""
    if args.num != "all" and not args.num.isdecimal():
        raise ValueError(f"--num must be a number of concepts or 'all', got {args.num!r}")
    labelled = labels(args.models)
    sampling = _sampling(args)

    from omnimoe.evaluate.base import METRICS
    from omnimoe.evaluate.run import evaluate

    for name in args.metrics or ():
        METRICS.get(name)
    raw = args.raw
    if raw is None and (Path(args.data) / "images.npy").is_file():
        raw = Path(args.data)
    models = {label: _model(source, args.device, args.untrained, args.seed) for label, source in labelled.items()}
    evaluation = evaluate(
        models,
        corpus=args.data,
        split=args.split,
        metrics=args.metrics,
        raw=raw,
        num=None if args.num == "all" else int(args.num),
        candidates=args.candidates,
        seed=args.seed,
        out=args.out,
        sampling=sampling,
        saved_sampling=args.sampling == "saved",
        batch_size=args.batch_size,
        show_progress=True,
    )
    if args.json:
        print(json.dumps(evaluation.to_dict()))
        return 0 if evaluation.measures else 1
    _tell(evaluation)
    print(f"report  {args.out / 'report.html'}\nnumbers {args.out / 'eval.json'}")
    return 0 if evaluation.measures else 1


def labels(models: list[str]) -> dict[str, str]:
    """A label for each model: what stands before ``=``, else the zoo name, else the folder that tells it apart.

    Example:
        >>> labels(["mot_nano", "runs/dense-seed0/checkpoint", "mine=runs/x/checkpoint"])
        {'mot_nano': 'mot_nano', 'dense-seed0': 'runs/dense-seed0/checkpoint', 'mine': 'runs/x/checkpoint'}
    """
    found: dict[str, str] = {}
    for given in models:
        named = re.fullmatch(r"([\w.\-]+)=(.+)", given)
        label, source = (named[1], named[2]) if named else ("", given)
        if not label:
            parts = [part for part in Path(given).parts if part not in ("checkpoint", "/", ".", "..")]
            label = parts[-1] if parts else given
        if named and label in found:
            raise ValueError(f"two models are called {label!r}; write LABEL=DIR with a label for each")
        numbered = (label if i == 1 else f"{label}-{i}" for i in itertools.count(1))
        found[next(name for name in numbered if name not in found)] = source
    return found


def _sampling(args: argparse.Namespace) -> dict[str, dict[str, float]]:
    """What was asked for, by modality; one number holds for pictures and speech, but these for pictures alone: one of
    guidance, one of candidates.
    """
    found: dict[str, dict[str, float]] = {"image": {}, "speech": {}}
    both, pictures = ("image", "speech"), ("image",)
    for what, usual in (("temperature", both), ("top_k", both), ("guidance", pictures), ("best_of", pictures)):
        given = getattr(args, what)
        named = given if isinstance(given, dict) else dict.fromkeys(usual if given is not None else (), given)
        for modality, value in named.items():
            if modality not in found:
                raise ValueError(f"--{what.replace('_', '-')} takes image=X and speech=X, got {modality!r}")
            found[modality][what] = value
    return found


def _model(source: str, device: str | None, untrained: bool, seed: int) -> OmniMoeForCausalLM:
    from omnimoe.commands._settings import read_device
    from omnimoe.hub import load, model_info
    from omnimoe.model import MODELS

    place = str(read_device(default_device(device)))
    if source not in MODELS or Path(source).is_dir() or model_info(source).pretrained is not None:
        return read_model(source, place)
    if not untrained:
        raise ValueError(
            f"there are no weights for {source!r}; train it and pass the folder, or evaluate fresh weights with "
            "--untrained"
        )
    return load(source, device=place, seed=seed)


def _tell(evaluation: Evaluation) -> None:
    from omnimoe.commands._tables import console, plain_table
    from omnimoe.evaluate.base import title_of
    from omnimoe.evaluate.tables import header, legend, lines

    screen: Any = console()
    for metric in evaluation.measures:
        screen.print(f"\n[bold]{metric}[/bold] ({evaluation.seconds[metric]:.0f} s)  {title_of(metric)}")
        named = header(evaluation, metric)
        told = lines(evaluation, metric, detail=False)
        if sum(max(map(len, column)) + 2 for column in zip(named, *told, strict=True)) > screen.width:
            told = lines(evaluation, metric, detail=False, intervals=False)
        table = plain_table(*named)
        for row in told:
            table.add_row(*row)
        screen.print(table)
        for note in evaluation.notes[metric]:
            screen.print(f"  {note}", style="dim", highlight=False)
        for file, _ in evaluation.sheets[metric]:
            print(f"  sheet   {file}")
    for metric, reason in evaluation.not_run.items():
        screen.print(f"\n[bold]{metric}[/bold]  not run: {reason}", highlight=False)
    print(f"\n{legend(evaluation)}")

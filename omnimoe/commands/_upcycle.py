"""Options of ``omnimoe train`` that start from trained weights, grown or as they are."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from omnimoe.data import Corpus
    from omnimoe.model import OmniMoeForCausalLM
    from omnimoe.routers import Router

_GROWING = ("add", "towers", "experts", "router", "markers")


def add_upcycling(parser: argparse.ArgumentParser) -> None:
    """Adds ``--from`` and what the seed may grow by."""
    group = parser.add_argument_group(
        "starting from a seed", "optimizer and schedule start anew; the data go on where the seed's run left them"
    )
    group.add_argument(
        "--from",
        dest="source",
        metavar="SEED",
        help="trained weights: a run's folder, a saved model, a Hub id, or a name of the zoo with weights",
    )
    group.add_argument("--add", metavar="NAME,...", help="modalities of the corpus that the seed lacks: image,speech")
    group.add_argument("--towers", metavar="MAP", help="modality, shared, or the copy of each modality: 0,1,1")
    group.add_argument("--experts", metavar="COUNTS", help="copies of each network: 8, or text=4,image=4,speech=2")
    group.add_argument("--router", help='of the experts: a name, or JSON such as {"type": "top_k", "top_k": 1}')
    group.add_argument(
        "--markers",
        choices=("front", "behind"),
        help="where boundary tokens lie; in front, as hf_text has them, for a seed of text alone",
    )
    group.add_argument("--fresh-data", action="store_true", help="read the data from the start")


def check_options(args: argparse.Namespace) -> None:
    """Refuses what does not go together.

    Raises:
        ValueError: naming the options.
    """
    if (args.model is None) == (args.source is None):
        raise ValueError("name a model to train, or a seed with --from; not both")
    given = [name for name in (*_GROWING, "fresh_data") if getattr(args, name)]
    if given and args.source is None:
        raise ValueError(f"--{given[0].replace('_', '-')} changes a seed; name one with --from")


def checkpoint_of(source: str) -> Path | None:
    """The checkpoint of a run that ``--from`` names, if it is one: its folder, or that of the run."""
    from omnimoe.train.checkpoint import SETTINGS_FILE

    folders = (Path(source), Path(source) / "checkpoint")
    return next((folder for folder in folders if (folder / SETTINGS_FILE).is_file()), None)


def grown(args: argparse.Namespace, corpus: Corpus) -> tuple[OmniMoeForCausalLM, str]:
    """The model that ``--from`` and the others ask for, and what was done in words.

    Raises:
        ValueError: if an option has another form, or does not fit the seed.
    """
    from omnimoe.hub import MODELS, from_pretrained, load
    from omnimoe.upcycle import upcycle

    checkpoint = checkpoint_of(args.source)
    if args.source in MODELS and checkpoint is None:
        seed = load(args.source, pretrained=True, dtype="float32")
    else:
        seed = from_pretrained(checkpoint or args.source, dtype="float32")
    if not any(getattr(args, name) for name in _GROWING):
        return seed, "as it was"
    is_text_alone = len(seed.config.modalities) == 1 and bool(args.add)
    model, report = upcycle(
        seed,
        modalities=_modalities(args.add, corpus),
        towers=_towers(args.towers),
        experts=_experts(args.experts),
        router=_router(args.router),
        markers=args.markers or ("front" if is_text_alone else "behind"),
        return_report=True,
    )
    return model, str(report)


def _modalities(given: str | None, corpus: Corpus) -> list[Any]:
    from omnimoe.modalities import Tokens

    names = [name.strip() for name in (given or "").split(",") if name.strip()]
    unknown = [name for name in names if name not in corpus.vocab_sizes]
    if unknown:
        raise ValueError(f"--add {unknown[0]}: corpus {corpus.name!r} holds {', '.join(corpus.vocab_sizes)}")
    lengths = corpus.meta["num_tokens"]
    return [Tokens.Config(name=n, vocab_size=corpus.vocab_sizes[n], num_tokens=lengths.get(n)) for n in names]


def _towers(given: str | None) -> Any:
    if given is None or given in ("modality", "shared"):
        return given
    try:
        return tuple(int(copy) for copy in given.split(","))
    except ValueError:
        raise ValueError(f"--towers takes modality, shared, or numbers such as 0,1,1; got {given!r}") from None


def _experts(given: str | None) -> Any:
    if given is None:
        return None
    try:
        if "=" not in given:
            return int(given)
        pairs = [entry.partition("=") for entry in given.split(",")]
        return {name.strip(): int(count) for name, _, count in pairs}
    except ValueError:
        raise ValueError(f"--experts takes a number, or text=4,image=4; got {given!r}") from None


def _router(given: str | None) -> Router.Config | None:
    if given is None:
        return None
    from omnimoe.routers import Router

    try:
        plain = json.loads(given) if given.lstrip().startswith("{") else {"type": given}
    except json.JSONDecodeError as error:
        raise ValueError(f"--router takes a name or JSON, got {given!r}: {error}") from None
    return Router.Config.from_dict(plain)

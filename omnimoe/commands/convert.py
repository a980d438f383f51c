"""``omnimoe convert``."""

from __future__ import annotations

import argparse
import dataclasses
import json


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    parser.add_argument("source", help="folder or Hub id of a published checkpoint, of one of ours with --to published")
    parser.add_argument("destination", help="folder to write")
    parser.add_argument("--to", choices=("omnimoe", "published"), default="omnimoe", help="the layout to write")
    parser.add_argument(
        "--max-shard-size",
        metavar="SIZE",
        help="largest file of weights (default: 5GB, or one file where the published layout is one)",
    )
    parser.add_argument("--revision", metavar="NAME", help="branch, tag or commit, on the Hub")
    parser.add_argument("--overwrite", action="store_true", help="replace the model that is in the destination")
    parser.add_argument("--offline", action="store_true", help="look on the Hub's local cache alone")
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(args: argparse.Namespace) -> int:
    """Converts a checkpoint and says what was written."""
    from omnimoe.checkpoint.memory import in_units
    from omnimoe.conversion import convert_checkpoint

    done = convert_checkpoint(
        args.source,
        args.destination,
        to=args.to,
        max_shard_size=args.max_shard_size,
        revision=args.revision,
        local_files_only=args.offline,
        overwrite=args.overwrite,
    )
    if args.json:
        print(json.dumps({**dataclasses.asdict(done), "folder": str(done.folder)}))
        return 0
    layout = "as omnimoe's" if args.to == "omnimoe" else "as published"
    print(f"{done.folder}: {done.num_tensors} tensors, {in_units(done.num_bytes)}, family {done.family}, {layout}")
    return 0

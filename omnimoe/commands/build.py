"""``omnimoe build``."""

from __future__ import annotations

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    parser.add_argument("--cuda", action="store_true", help="the kernels for CUDA; needs nvcc, but no device")
    parser.add_argument("--out", type=Path, help="folder of the library; by default where it is looked for")


def run(args: argparse.Namespace) -> int:
    """Builds compiled kernels now and not on first use; says where they are, or why they cannot be."""
    from omnimoe.ops._extension import DURATIONS, build, cache_folder, find

    kind = "cuda" if args.cuda else "cpu"
    path = None if args.out else find(kind)
    if path is None:
        print(f"building the {kind.upper()} kernels: {DURATIONS[kind]}", flush=True)
        path = build(args.out or cache_folder(), kind)
    print(path)
    return 0

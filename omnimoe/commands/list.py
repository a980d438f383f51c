"""``omnimoe list``."""

from __future__ import annotations

import argparse
import dataclasses
import json


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    parser.add_argument("filter", nargs="?", default="", help="names to show, with * and ?; all where left out")
    parser.add_argument("--family", help="models of this family alone")
    parser.add_argument("--modality", help="models that have this modality alone")
    parser.add_argument("--pretrained", action="store_true", help="models with weights alone")
    parser.add_argument("--names", action="store_true", help="print names and nothing else, which is quick")
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(args: argparse.Namespace) -> int:
    """Prints a line a model."""
    from omnimoe.hub import list_models, model_info

    names = list_models(args.filter, family=args.family, modality=args.modality, pretrained=args.pretrained)
    if args.names:
        print(json.dumps(names) if args.json else "\n".join(names))
        return 0
    if not names and not args.json:
        raise ValueError(f"no model of {len(list_models())} fits; 'omnimoe list --names' prints them all")
    infos = [model_info(name) for name in names]
    if args.json:
        print(json.dumps([dataclasses.asdict(info) for info in infos]))
        return 0
    from rich.table import Table

    from omnimoe.commands._tables import console, count, known

    table = Table(box=None, pad_edge=False, header_style="bold")
    for heading in ("name", "total", "active", "FLOPs/token", "modalities", "weights", "paper", "licence"):
        table.add_column(heading, justify="right" if heading in ("total", "active", "FLOPs/token") else "left")
    for info in infos:
        table.add_row(
            info.name,
            count(info.total_params),
            known(info.active_params),
            known(info.flops_per_token),
            ", ".join(info.modalities),
            "ships" if (info.pretrained or "").startswith("local-dir:") else info.pretrained or "none",
            info.paper.rsplit("/", 1)[-1],
            info.license,
        )
    console().print(table)
    print(
        f"\n{len(infos)} models; active: parameters that a token meets; FLOPs/token: forward, at a model's longest "
        "sequence; 'omnimoe info NAME' tells more of one"
    )
    return 0

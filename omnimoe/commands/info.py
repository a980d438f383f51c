"""``omnimoe info``."""

from __future__ import annotations

import argparse
import dataclasses
import json


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    parser.add_argument("model", help="a name of the zoo")
    parser.add_argument("--config", action="store_true", help="print the model's config as JSON")
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(args: argparse.Namespace) -> int:
    """Prints what is known of a model."""
    from omnimoe.commands._tables import count, known
    from omnimoe.hub import model_info
    from omnimoe.model import MODELS

    info = model_info(args.model)
    if args.config:
        print(MODELS.get(args.model)().to_json_string(use_diff=False).strip())
        return 0
    if args.json:
        print(json.dumps(dataclasses.asdict(info)))
        return 0
    told = {
        "name": info.name,
        "": info.description,
        "family": info.family,
        "parameters": f"{info.total_params:,} ({count(info.total_params)})",
        **{f"active, {name}": known(number) for name, number in (info.active_params_by_modality or {}).items()},
        "FLOPs a token": f"{known(info.flops_per_token)}, forward, in a sequence of {info.sequence_length}",
        "modalities": ", ".join(info.modalities),
        "weights": info.pretrained or "none",
        "paper": info.paper,
        **({"related": ", ".join(info.related)} if info.related else {}),
        "licence": info.license,
    }
    width = max(map(len, told))
    for key, value in told.items():
        print(f"{key:<{width}}  {value}")
    return 0

"""What is checked of a folder before anything in it is used."""

from __future__ import annotations

import re
from pathlib import Path

from omnimoe.checkpoint.errors import CheckpointError, read_json


def check_folder(folder: Path) -> None:
    """Refuses a folder that is no checkpoint of ours, before anything in it is used."""
    if not (folder / "config.json").is_file():
        raise CheckpointError(f"{folder} has no config.json, so it is no saved model")
    kind = read_json(folder / "config.json", CheckpointError).get("model_type")
    if kind != "omnimoe":
        raise CheckpointError(f"{folder} holds a model of type {kind!r}, not 'omnimoe'; convert it first")
    check_weights(folder)


def check_weights(folder: Path) -> None:
    """Refuses a folder whose weights are missing, or would be looked for outside of it."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        shards = read_json(index, CheckpointError).get("weight_map")
        if not isinstance(shards, dict) or not shards or not all(isinstance(shard, str) for shard in shards.values()):
            raise CheckpointError(f"{index} has no weight_map from keys to file names")
        for shard in sorted(set(shards.values())):
            if not re.fullmatch(r"[\w\-][\w.\-]*\.safetensors", shard):
                raise CheckpointError(f"{index} names {shard!r}; a shard is a .safetensors file in the same folder")
            if not (folder / shard).is_file():
                held = [key for key, value in shards.items() if value == shard]
                raise CheckpointError(f"{folder / shard} is missing; it holds {len(held)} weights, {held[0]} for one")
    elif not (folder / "model.safetensors").is_file():
        other = sorted(file.name for file in folder.iterdir() if file.suffix in (".bin", ".pt", ".pth", ".ckpt"))
        found = f"only {', '.join(other)}, which can run code" if other else "no weights"
        raise CheckpointError(f"{folder} has no model.safetensors, {found}; write it with save_pretrained")

"""What is checked of a checkpoint before and after it is read.

A checkpoint is untrusted input: safetensors only, no path outside of its folder, no code, and every key must fit.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from os import fspath
from pathlib import Path
from typing import Any

from omnimoe.model import MODELS


class CheckpointError(ValueError):
    """A checkpoint that is missing, malformed, unsafe, or does not fit its config."""


def folder_of(source: str, *, revision: str | None, local_files_only: bool, token: str | None) -> Path:
    """The folder of a checkpoint, fetched from the Hub where ``source`` is no folder.

    Args:
        source: an existing folder, ``local-dir:folder``, ``org/name`` or ``hf-hub:org/name``.
        revision: branch, tag or commit, on the Hub.
        local_files_only: look in the local cache alone.
        token: for private repositories.

    Raises:
        CheckpointError: if there is no such folder or repository.
    """
    prefix, _, rest = source.partition(":")
    if prefix == "local-dir" or (prefix != "hf-hub" and Path(source).is_dir()):
        folder = Path(rest if prefix == "local-dir" else source)
        if not folder.is_dir():
            raise CheckpointError(f"there is no folder {fspath(folder)!r}; name the folder of a saved model")
        return folder
    name = rest if prefix == "hf-hub" else source
    if prefix != "hf-hub" and name in MODELS:
        raise CheckpointError(f"{name!r} is a registered model, not a checkpoint; call load({name!r})")
    if not re.fullmatch(r"[\w.\-]+/[\w.\-]+", name):
        raise CheckpointError(
            f"{source!r} is neither an existing folder nor an id on the Hub (org/name), "
            f"and no registered model has that name{MODELS.hint(name)}"
        )
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(
            snapshot_download(
                name,
                revision=revision,
                token=token,
                local_files_only=local_files_only,
                allow_patterns=["*.json", "*.safetensors"],
            )
        )
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise CheckpointError(f"{name!r} could not be fetched from the Hub: {error}") from error


def check_folder(folder: Path) -> None:
    """Refuses a folder that is no checkpoint of ours, before anything in it is used."""
    if not (folder / "config.json").is_file():
        raise CheckpointError(f"{folder} has no config.json, so it is no saved model")
    kind = read_json(folder / "config.json", CheckpointError).get("model_type")
    if kind != "omnimoe":
        raise CheckpointError(f"{folder} holds a model of type {kind!r}, not 'omnimoe'; convert it first")
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


def read_json(path: Path, error: Callable[[str], Exception]) -> dict[str, Any]:
    """A JSON object from a file; what is wrong with it is raised as ``error``."""
    try:
        plain = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as cause:
        raise error(f"{path} cannot be read as JSON: {cause}") from cause
    if not isinstance(plain, dict):
        raise error(f"{path} must hold a JSON object, not {type(plain).__name__}")
    return plain


def complaint(report: dict[str, Any]) -> str:
    """What does not fit, by kind, layers taken together, at most ten lines a kind; empty where all fits.

    Args:
        report: transformers' loading info.
    """
    parts: list[str] = []
    for kind in ("missing", "unexpected"):
        keys = sorted(report.get(f"{kind}_keys") or ())
        groups: dict[str, list[str]] = {}
        for key in keys:
            module, _, leaf = key.rpartition(".")
            groups.setdefault(re.sub(r"[.]\d+[.]", ".*.", f"{module}.{leaf}"), []).append(key)
        lines = [pattern if len(found) == 1 else f"{pattern} ({len(found)} times)" for pattern, found in groups.items()]
        parts += _listed(kind, len(keys), lines)
    shapes = sorted(report.get("mismatched_keys") or ())
    lines = [f"{key}: {tuple(held)} in the file, {tuple(want)} in the model" for key, held, want in shapes]
    parts += _listed("misshapen", len(shapes), lines)
    return "\n".join([*parts, *map(str, report.get("error_msgs") or ())])


def _listed(kind: str, count: int, lines: list[str]) -> list[str]:
    if not lines:
        return []
    more = [f"  and {len(lines) - 10} more"] if len(lines) > 10 else []
    return [f"{count} {kind}:", *(f"  {line}" for line in lines[:10]), *more]

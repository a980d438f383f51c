"""Checkpoints to break: how they are written, what is in them, and that a refusal leaves everything as it was."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from omnimoe.model import OmniMoeConfig, OmniMoeForCausalLM
from tests.declarations import DECLARATIONS

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"


def small(kind: str = "moe", **changes: Any) -> OmniMoeConfig:
    """A model of 20 kB."""
    return DECLARATIONS[kind].replace(**changes)


def contents(folder: Path) -> dict[str, str]:
    """What every file of a folder holds, and where every link leads."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_symlink():
            found[name] = f"-> {path.readlink()}"
        elif path.is_file():
            found[name] = hashlib.sha256(path.read_bytes()).hexdigest()
    return found


def left_behind(folder: Path) -> list[str]:
    """What a save left lying about in a folder."""
    return [path.name for path in folder.iterdir() if path.name.startswith(".")]


def load(folder: Path, **given: Any) -> OmniMoeForCausalLM:
    """By the class, which is what ``omnimoe.from_pretrained`` and ``AutoModelForCausalLM`` end at."""
    return OmniMoeForCausalLM.from_pretrained(folder, **given)


def edit(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any], file: str = WEIGHTS) -> None:
    """Changes weights in place, as a file that is sound."""
    weights = load_file(folder / file)
    change(weights)
    save_file(weights, folder / file, metadata={"format": "pt"})


def edit_json(path: Path, **changes: Any) -> None:
    """Changes fields of a JSON file; None takes one away."""
    plain = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({name: value for name, value in plain.items() if value is not ...}))


def safetensors(header: object, data: bytes = b"", *, length: int | None = None) -> bytes:
    """A file as the format has it, from any header."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


def same_weights(one: torch.nn.Module, other: torch.nn.Module) -> bool:
    """Whether two models hold the same, bit for bit."""
    first, second = one.state_dict(), other.state_dict()
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)

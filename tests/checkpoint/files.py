"""Checkpoints to break: how they are written, what is in them, and that a refusal leaves everything as it was."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from omnimoe import CheckpointError
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


@contextmanager
def refused(folder: Path, fragment: str, error: type[Exception] = CheckpointError) -> Iterator[None]:
    """The block raises, says why, and changes nothing: no file, no random number, no module."""
    files, random, modules = contents(folder), torch.get_rng_state(), set(sys.modules)
    with pytest.raises(error) as caught:
        yield
    assert fragment in str(caught.value)
    assert contents(folder) == files
    assert torch.equal(torch.get_rng_state(), random)
    code = {name for name in set(sys.modules) - modules if not name.startswith(("transformers", "omnimoe", "torch"))}
    assert not any(str(folder) in str(getattr(sys.modules[name], "__file__", "")) for name in code)


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


def in_child(action: Callable[[], Any], *, memory: int = 2 << 30) -> Any:
    """Runs something destructive in a copy of this process that may take so much more memory, and no more.

    Returns:
        What it returned, as JSON has it.

    Raises:
        ChildError: with its traceback; ``signal`` names what killed it.
    """
    resource = pytest.importorskip("resource")
    if not hasattr(os, "fork"):
        pytest.skip("needs fork")
    back, to = os.pipe()
    child = os.fork()
    if child == 0:  # pragma: no cover
        os.close(back)
        status = 1
        try:
            pages = int(Path("/proc/self/statm").read_text().split()[0])
            limit = pages * os.sysconf("SC_PAGE_SIZE") + memory
            resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
            answer = json.dumps(action())
            status = 0
        except BaseException:
            answer = traceback.format_exc()
        os.write(to, answer.encode()[-60_000:])
        os._exit(status)
    os.close(to)
    with os.fdopen(back, "rb") as pipe:
        answer = pipe.read().decode(errors="replace")
    _, status = os.waitpid(child, 0)
    if status:
        raise ChildError(answer, -os.waitstatus_to_exitcode(status))
    return json.loads(answer)


class ChildError(Exception):
    """A child that raised or was killed."""

    def __init__(self, answer: str, number: int) -> None:
        super().__init__(answer)
        self.signal = signal.Signals(number) if number > 0 else None

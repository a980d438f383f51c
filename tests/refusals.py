"""That something is refused, in which words, and that nothing is otherwise afterwards.

What a case hands in is compared with itself from before: folders byte for byte, models with their gradients,
registries, or what a function says. So is what belongs to the whole process: random numbers, the environment,
registered names, imported code.
"""

from __future__ import annotations

import functools
import os
import random
import site
import sys
import sysconfig
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from omnimoe import CheckpointError
from omnimoe.registry import Registry
from tests.checkpoint.files import contents

ROOT = Path(__file__).parents[1]


@dataclass
class Refusal:
    """What was raised; None where nothing was."""

    value: BaseException | None = None

    def __str__(self) -> str:
        return str(self.value or "")


@contextmanager
def refused(
    of: object,
    fragment: str,
    error: type[BaseException] = CheckpointError,
    *,
    is_sure: bool = True,
) -> Iterator[Refusal]:
    """The block raises, says why, and changes nothing.

    Args:
        of: what could have been harmed, as :func:`state_of` knows it; several of them in a tuple, which is not empty.
        fragment: of the message, not blank.
        error: that is raised, of this type or one derived from it, and not the one from which all are.
        is_sure: it may not go through; where it does, it may change what it likes.

    Yields:
        Where the error lies after the block.
    """
    assert fragment.strip(), "a refusal is held to words, and any message holds these"
    kinds = error if isinstance(error, tuple) else (error,)
    assert not {Exception, BaseException} & set(kinds), "a refusal is held to a type, and any mistake has this one"
    before, told = Snapshot(of), Refusal()
    try:
        yield told
    except error as raised:
        told.value = raised
    if told.value is None:
        assert not is_sure, f"nothing was refused; {error.__name__} was to say {fragment!r}"
        return
    assert fragment in str(told)
    before.check()


@contextmanager
def unchanged(*of: object, draws: bool = False) -> Iterator[None]:
    """The block goes through and changes nothing of what is handed in or of the process.

    Args:
        of: as for :func:`refused`.
        draws: random numbers of torch may be drawn, as for weights that are made afresh.
    """
    before = Snapshot(of)
    yield
    if draws:
        torch.set_rng_state(before.random)
    before.check()


class Snapshot:
    """How things are now, the process among them."""

    def __init__(self, of: object) -> None:
        assert not is_nothing(of), f"hand in what could have been harmed; {of!r} cannot be"
        self.of = of
        self.tables = tables()
        self.places = [*code_places(), *filter(None, sys.path)]
        self.modules = set(sys.modules)
        self.random = torch.get_rng_state()
        self.held = self._now()

    def check(self) -> None:
        """Fails where anything is otherwise than it was."""
        now = self._now()
        found = [*differences(self.held, now), *self._foreign_code()]
        assert not found, f"changed: {'; '.join(found[:10])}"

    def _now(self) -> dict[str, object]:
        return {"given": state_of(self.of), "process": process_state(self.tables)}

    def _foreign_code(self) -> list[str]:
        """Modules that were imported since, from a folder that was handed in or from where no code is installed."""
        found = []
        for name in sorted(set(sys.modules) - self.modules):
            file = getattr(sys.modules[name], "__file__", None)
            if file is None:
                continue
            path = Path(file).resolve()
            is_given = any(path.is_relative_to(folder.resolve()) for folder in folders_of(self.of))
            if is_given or not any(path.is_relative_to(Path(place).resolve()) for place in self.places):
                found.append(f"the module {name} was imported from {file}")
        return found


def is_nothing(thing: object) -> bool:
    """Whether nobody can harm a thing: plain values, and collections that are empty."""
    if isinstance(thing, tuple):
        return all(map(is_nothing, thing))
    return (
        thing is None
        or isinstance(thing, str | bytes | int | float)
        or (isinstance(thing, list | Mapping) and not thing)
    )


def state_of(thing: object) -> object:
    """A copy of what a thing holds, equal to another where nothing changed.

    Args:
        thing: a file or folder, which need not be there; a tensor, model or registry; a function, for what it returns;
            mappings and lists of these and of plain values.
    """
    if isinstance(thing, Path):
        return files_of(thing)
    if isinstance(thing, Tensor):
        # by its bits: NaN is not equal to itself
        bits = thing.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        return (str(thing.dtype), tuple(thing.shape), bits)
    if isinstance(thing, nn.Module):
        grads = {name: parameter.grad for name, parameter in thing.named_parameters()}
        modes = {name: module.training for name, module in thing.named_modules()}
        return {"weights": state_of(thing.state_dict()), "gradients": state_of(grads), "is training": modes}
    if isinstance(thing, Registry):
        return {name: id(part) for name, part in thing._parts.items()}
    if isinstance(thing, Mapping):
        return {str(key): state_of(value) for key, value in thing.items()}
    if isinstance(thing, list | tuple):
        return {str(number): state_of(value) for number, value in enumerate(thing)}
    if callable(thing):
        return state_of(thing())
    if thing is None or isinstance(thing, str | bytes | int | float):
        return repr(thing)
    raise TypeError(f"nobody knows what a {type(thing).__name__} holds; pass a function that says it")


def files_of(path: Path) -> dict[str, object]:
    """What is in a folder, and of which kind it is; empty where there is nothing."""
    if not os.path.lexists(path):
        return {}
    found = [path, *(sorted(path.rglob("*")) if path.is_dir() else [])]
    kinds: dict[str, object] = {str(held): oct(held.lstat().st_mode) for held in found}
    if path.is_file():
        return kinds | {"bytes": path.read_bytes()}
    return kinds | dict(contents(path))


def folders_of(thing: object) -> list[Path]:
    """The files and folders among what is handed in."""
    if isinstance(thing, list | tuple):
        return [path for held in thing for path in folders_of(held)]
    return [thing] if isinstance(thing, Path) else []


def tables() -> list[Registry]:
    """Every registry of omnimoe; what loads on first use is loaded, or the first look-up would seem to change it."""
    for name in set(sys.modules) - _LOOKED_AT:
        _LOOKED_AT.add(name)
        if name.partition(".")[0] == "omnimoe":
            _TABLES.update({id(held): held for held in vars(sys.modules[name]).values() if isinstance(held, Registry)})
    for table in _TABLES.values():
        table.names()
    return list(_TABLES.values())


_LOOKED_AT: set[str] = set()
_TABLES: dict[int, Registry] = {}


def process_state(tables: list[Registry]) -> dict[str, object]:
    """What all code of a process shares."""
    return {
        "random numbers of torch": state_of(torch.get_rng_state()),
        "random numbers of NumPy": [held.tolist() for held in map(np.asarray, np.random.get_state())],
        "random numbers of Python": random.getstate(),
        "the environment": dict(os.environ),
        "the current folder": os.getcwd(),
        "sys.path": repr(sys.path),
        "torch's defaults": repr((torch.get_default_dtype(), torch.get_default_device(), torch.get_num_threads())),
        "whether gradients are taken": torch.is_grad_enabled(),
        "models of transformers": {name: id(held) for name, held in CONFIG_MAPPING._extra_content.items()},
        "attention of transformers": {name: id(ALL_ATTENTION_FUNCTIONS[name]) for name in ALL_ATTENTION_FUNCTIONS},
        **{f"registry of {table.kind}": state_of(table) for table in tables},
    }


@functools.cache
def code_places() -> tuple[str, ...]:
    """Where code is installed."""
    return (str(ROOT), *sysconfig.get_paths().values(), *site.getsitepackages(), site.getusersitepackages())


def differences(one: object, other: object, at: str = "") -> Iterator[str]:
    """Where two states are not the same, in words."""
    if not (isinstance(one, dict) and isinstance(other, dict)):
        if one != other:
            yield f"{at} was {_short(one)} and is {_short(other)}"
        return
    for key in {**one, **other}:
        place = f"{at} / {key}" if at else str(key)
        if key not in other:
            yield f"{place} is gone"
        elif key not in one:
            yield f"{place} is new"
        else:
            yield from differences(one[key], other[key], place)


def _short(held: object) -> str:
    text = repr(held)
    return text if len(text) < 80 else f"{text[:60]}... ({len(text)} characters)"

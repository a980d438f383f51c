"""What every check of a checkpoint raises, what it leaves as it was, and the reading of its JSON files."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

import torch

JSON_LIMIT = 32 << 20
"""Bytes of the largest JSON that is read; an index of 100,000 weights takes a third of it."""


class CheckpointError(ValueError):
    """A checkpoint that is missing, malformed, unsafe, or does not fit its config."""


class MisfitError(CheckpointError):
    """Weights that are sound and do not fit the config, by name, shape or dtype."""


@contextmanager
def draws_undone() -> Iterator[None]:
    """Puts random numbers back where something is raised: weights that are missing may have been drawn by then."""
    before = torch.get_rng_state()
    try:
        yield
    except BaseException:
        torch.set_rng_state(before)
        raise


def read_json(path: Path, error: Callable[[str], Exception]) -> dict[str, Any]:
    """A JSON object from a file; what is wrong with it is raised as ``error``."""
    try:
        size = path.stat().st_size
        if size > JSON_LIMIT:
            raise ValueError(f"it has {size:,} bytes, and no config or index has more than {JSON_LIMIT:,}")
        plain = parse_json(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as cause:
        raise error(f"{path} cannot be read as JSON: {cause}") from cause
    if not isinstance(plain, dict):
        raise error(f"{path} must hold a JSON object, not {type(plain).__name__}")
    return plain


def parse_json(text: str, *, constants: bool = True) -> Any:
    """JSON in which no key stands twice, which readers would take differently.

    Args:
        text: what is parsed.
        constants: allow NaN and Infinity, which Python writes.

    Raises:
        ValueError: if it is none.
    """
    return json.loads(text, object_pairs_hook=_unique, parse_constant=float if constants else _refuse_constant)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the key {twice!r} stands there twice")
    return found


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number of JSON")

"""What every check of a checkpoint raises, and the reading of its JSON files."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any


class CheckpointError(ValueError):
    """A checkpoint that is missing, malformed, unsafe, or does not fit its config."""


def read_json(path: Path, error: Callable[[str], Exception]) -> dict[str, Any]:
    """A JSON object from a file; what is wrong with it is raised as ``error``."""
    try:
        plain = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as cause:
        raise error(f"{path} cannot be read as JSON: {cause}") from cause
    if not isinstance(plain, dict):
        raise error(f"{path} must hold a JSON object, not {type(plain).__name__}")
    return plain

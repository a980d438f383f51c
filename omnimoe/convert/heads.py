"""Families whose files hold one head or another on the same stack: which, is asked of the names of the weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omnimoe.checkpoint import CheckpointError
from omnimoe.convert.converter import CONFIG, Converter
from omnimoe.convert.files import stored_names
from omnimoe.model import OmniMoeConfig


@dataclass(frozen=True, kw_only=True)
class HeadedConverter(Converter):
    """A converter whose ``config.json`` lists the heads of a file under ``"heads"``, or leaves them to be found.

    Args:
        heads: by name, a published weight that tells the head.
    """

    heads: Mapping[str, str] = field(default_factory=dict)

    def read(self, folder: Path) -> OmniMoeConfig:
        """See :class:`Converter`; what the file holds counts, whatever ``config.json`` says."""
        config, names = super().read(folder), set(stored_names(folder))
        found = [kind for kind, name in self.heads.items() if name in names]
        plain = config.published["files"][CONFIG]
        return config if not names or plain.get("heads", []) == found else self.config_of({**plain, "heads": found})


def listed_heads(plain: Mapping[str, Any], known: Mapping[str, str]) -> tuple[str, ...]:
    """The heads that a published config lists.

    Args:
        plain: the config.
        known: as for :class:`HeadedConverter`.

    Raises:
        CheckpointError: if it names another.
    """
    kinds = tuple(plain.get("heads", ()))
    unknown = sorted(set(kinds) - set(known))
    if unknown:
        raise CheckpointError(f"heads names {unknown[0]!r}; known: {', '.join(known)}")
    return kinds


__all__ = ["HeadedConverter", "listed_heads"]

"""What is known of a checkpoint's licence: by its own card, or by its family."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from huggingface_hub import metadata_load

logger = logging.getLogger(__name__)

FREE = frozenset(
    {"apache-2.0", "mit", "bsd-2-clause", "bsd-3-clause", "cc0-1.0", "cc-by-4.0", "isc", "unlicense", "zlib"}
)
"""Licences, as cards on the Hub spell them, that restrict no use."""


def license_facts(name: str) -> dict[str, Any]:
    """A licence as the head of a README has it on the Hub, which knows few names and calls the rest ``other``.

    Args:
        name: of SPDX or of the Hub; one in words is neither.

    Example:
        >>> license_facts("MIT"), license_facts("DeepSeek Model License")
        ({'license': 'mit'}, {'license': 'other', 'license_name': 'deepseek-model-license'})
    """
    name = name.lower()
    return {"license": "other", "license_name": name.replace(" ", "-")} if " " in name else {"license": name}


def facts_of(folder: Path) -> dict[str, Any]:
    """What the head of ``README.md`` says of the licence, in the fields of the Hub; nothing where it does not, or
    cannot be read.
    """
    path = folder / "README.md"
    if not path.is_file():
        return {}
    try:
        told = metadata_load(path) or {}
    except Exception as error:  # of a YAML reader that transformers brings, on somebody else's text
        logger.info("the head of %s cannot be read: %s", path, error)
        return {}
    held = {name: told.get(name) for name in ("license", "license_name", "license_link")}
    if isinstance(held["license"], list):
        held["license"] = ", ".join(map(str, held["license"]))
    if held["license_name"] and not held["license"]:
        held["license"] = "other"
    return {name: str(value) for name, value in held.items() if value} if held["license"] else {}


def licence_of(folder: Path) -> str | None:
    """The licence in the head of ``README.md``; None where there is none or it cannot be read.

    Example:
        >>> import tempfile
        >>> folder = Path(tempfile.mkdtemp())
        >>> _ = (folder / "README.md").write_text("---" + chr(10) + "license: llama3.2" + chr(10) + "---")
        >>> licence_of(folder)
        'llama3.2'
    """
    told = facts_of(folder)
    return told.get("license_name") or told.get("license")


def tell(folder: Path, notice: str, *, name: str | None = None) -> None:
    """Logs what restricts the use of a checkpoint.

    Args:
        folder: of the checkpoint.
        notice: what is known of its family; empty where nothing restricts all of it.
        name: of the checkpoint, where it is not that of the folder.
    """
    licence = licence_of(folder)
    if notice:
        logger.warning("%s: %s", name or folder.name, notice)
    elif licence is not None and licence.lower() not in FREE:
        logger.warning(
            "%s is under the licence %r, which may restrict its use; its README.md says more", name or folder, licence
        )

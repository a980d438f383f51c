"""What a checkpoint's own card says of its licence."""

from __future__ import annotations

import logging
from pathlib import Path

from huggingface_hub import metadata_load

logger = logging.getLogger(__name__)

FREE = frozenset(
    {"apache-2.0", "mit", "bsd-2-clause", "bsd-3-clause", "cc0-1.0", "cc-by-4.0", "isc", "unlicense", "zlib"}
)
"""Licences, as cards on the Hub spell them, that restrict no use."""


def licence_of(folder: Path) -> str | None:
    """The licence in the head of ``README.md``; None where there is none or it cannot be read.

    Example:
        >>> import tempfile
        >>> folder = Path(tempfile.mkdtemp())
        >>> _ = (folder / "README.md").write_text("---" + chr(10) + "license: llama3.2" + chr(10) + "---")
        >>> licence_of(folder)
        'llama3.2'
    """
    path = folder / "README.md"
    if not path.is_file():
        return None
    try:
        told = metadata_load(path) or {}
    except Exception as error:  # of a YAML reader that transformers brings, on somebody else's text
        logger.info("the head of %s cannot be read: %s", path, error)
        return None
    licence = told.get("license_name") or told.get("license")
    return ", ".join(map(str, licence)) if isinstance(licence, list) else licence and str(licence)


def tell(folder: Path, notice: str) -> None:
    """Logs what restricts the use of a checkpoint.

    Args:
        folder: of the checkpoint.
        notice: what is known of its family; empty where nothing restricts all of it.
    """
    licence = licence_of(folder)
    if notice:
        logger.warning("%s: %s", folder.name, notice)
    elif licence is not None and licence.lower() not in FREE:
        logger.warning(
            "%s is under the licence %r, which may restrict its use; its README.md says more", folder, licence
        )

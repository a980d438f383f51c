"""One name to a reader."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from omnimoe.data.readers.base import Reader
from omnimoe.data.readers.folder import FolderReader
from omnimoe.data.readers.hub import DatasetReader
from omnimoe.data.readers.tar import TarReader

_TABLES = (".parquet", ".arrow")


def open_reader(source: Any, columns: Mapping[str, str] | None = None, *, split: str = "train") -> Reader:
    """The reader for a source of documents.

    Args:
        source: a folder or file of JSON lines, pictures and sound; tar files, as a path, a pattern or a list of them; a
            folder or file of Parquet or Arrow; ``"hub:NAME"`` for a name on the Hugging Face Hub, which is streamed; a
            dataset of that library; or a reader, which is given back.
        columns: modality to the name of its field.
        split: of a table or a name on the Hub that has several.

    Raises:
        DocumentError: if there is nothing of use.

    Example:
        >>> open_reader("no/such/folder")
        Traceback (most recent call last):
        omnimoe.data.readers.base.DocumentError: no/such/folder does not exist; pass a folder or a file of JSON lines
    """
    if isinstance(source, Reader):
        return source
    if isinstance(source, list | tuple):
        return TarReader(source, columns)
    if not isinstance(source, str | os.PathLike):
        return DatasetReader(source, columns)
    name = os.fspath(source)
    if name.startswith("hub:"):
        return DatasetReader.load(name.removeprefix("hub:"), split=split, streaming=True, columns=columns)
    path = Path(name).expanduser()
    if name.endswith((".tar", ".tar.gz", ".tgz")):
        return TarReader(name, columns)
    if path.is_dir() and not any(path.rglob("*.jsonl")):
        # Metadata wins: a folder may hold tables for another purpose.
        if any(path.glob("*.tar")):
            return TarReader(str(path / "*.tar"), columns)
        if (path / "state.json").is_file() or any(next(path.rglob(f"*{ending}"), None) for ending in _TABLES):
            return DatasetReader.load(path, split=split, columns=columns)
    if path.suffix in _TABLES:
        return DatasetReader.load(path, split=split, columns=columns)
    return FolderReader(path, columns)

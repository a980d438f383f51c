"""A folder of one's own: JSON lines that name files, or files that belong together by name.

With ``metadata.jsonl``, as Hugging Face's imagefolder and audiofolder have it, or any other ``*.jsonl``, every line is
a row; file names are relative to the file's own folder. Without one, files of the same path but for the ending are one
row: ``cats/001.png``, ``cats/001.txt`` and ``cats/001.wav``.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omnimoe.data.readers.base import Document, DocumentError, Item, RawFile, Reader
from omnimoe.data.readers.fields import SPLIT_NAMES, modality_of, to_document

_LINES_A_SHARD = 1000


@dataclass(frozen=True, kw_only=True)
class _Part:
    """A thousand lines of a file: where they start, and the number of the first."""

    file: Path
    offset: int
    first_line: int
    lines: int


class FolderReader(Reader):
    """Rows of a folder.

    Args:
        folder: the folder, or one file of JSON lines.
        columns: modality to the name of its field; None for the usual ones, see
            :data:`omnimoe.data.readers.fields.COLUMNS`.

    Raises:
        DocumentError: if there is no such folder, or it holds neither JSON lines nor pictures, texts or sound.
    """

    def __init__(self, folder: str | os.PathLike[str], columns: Mapping[str, str] | None = None) -> None:
        path = Path(folder).expanduser()
        if not path.exists():
            raise DocumentError(f"{path} does not exist; pass a folder or a file of JSON lines")
        self.columns = dict(columns or {})
        self.root = path if path.is_dir() else path.parent
        files = sorted(path.rglob("*.jsonl")) if path.is_dir() else [path]
        self._parts = [part for file in files for part in _parts(file)]
        self._groups: list[list[str]] = [] if files else _groups(path)
        if not self._parts and not self._groups:
            raise DocumentError(f"{path} holds no rows: neither lines in *.jsonl nor pictures, texts or sound files")
        self.num_shards = len(self._parts) or -(-len(self._groups) // _LINES_A_SHARD)
        sizes = [(str(file.relative_to(self.root)), file.stat().st_size) for file in files] or self._groups
        self.identity = f"folder {hashlib.sha256(json.dumps([sizes, self.columns]).encode()).hexdigest()}"

    def read(self, shard: int, start: int = 0) -> Iterator[Item]:
        if self._groups:
            first = shard * _LINES_A_SHARD
            for index in range(start, min(_LINES_A_SHARD, len(self._groups) - first)):
                group = self._groups[first + index]
                yield Item(shard=shard, index=index, where=str(self.root / group[0]), content=group)
            return
        part = self._parts[shard]
        with part.file.open("rb") as file:
            file.seek(part.offset)
            for index in range(part.lines):
                line = file.readline()
                if index >= start and line.strip():
                    where = f"{part.file}, line {part.first_line + index}"
                    yield Item(shard=shard, index=index, where=where, content=(part.file, line))

    def document(self, item: Item) -> Document:
        if isinstance(item.content, list):
            return self._grouped(item)
        file, line = item.content
        try:
            fields = json.loads(line)
        except ValueError as error:
            raise DocumentError(f"{item.where}: is not JSON: {error}") from None
        document = to_document(fields, item.where, lambda name: self._find(file.parent, name, item.where), self.columns)
        return self._with_split(document, file)

    def _grouped(self, item: Item) -> Document:
        fields: dict[str, Any] = {}
        for name in item.content:
            modality = modality_of(name)
            path = self.root / name
            if modality == "text":
                try:
                    fields["text"] = path.read_text(encoding="utf-8").strip()
                except (OSError, UnicodeDecodeError) as error:
                    raise DocumentError(f"{path}: cannot be read as text: {error}") from None
            elif modality is not None:
                fields[modality] = name
        document = to_document(fields, item.where, lambda name: self._find(self.root, name, item.where))
        return self._with_split(document, self.root / item.content[0])

    def _find(self, folder: Path, name: str, where: str) -> RawFile:
        path = folder / name
        # Lines are often written by others; they may not reach what lies beside the folder.
        if Path(name).is_absolute() or not path.resolve().is_relative_to(self.root.resolve()):
            raise DocumentError(f"{where}: {name} lies outside of {self.root}; file names are relative and stay inside")
        return RawFile(name=str(path), path=path)

    def _with_split(self, document: Document, file: Path) -> Document:
        parts = file.relative_to(self.root).parts
        if "split" not in document.fields and len(parts) > 1 and parts[0] in SPLIT_NAMES:
            document.fields["split"] = SPLIT_NAMES[parts[0]]
        return document


def _parts(file: Path) -> Iterator[_Part]:
    offset = start = lines = first = 0
    with file.open("rb") as opened:
        for number, line in enumerate(opened):
            if lines == _LINES_A_SHARD:
                yield _Part(file=file, offset=start, first_line=first + 1, lines=lines)
                start, first, lines = offset, number, 0
            offset += len(line)
            lines += 1
    if lines:
        yield _Part(file=file, offset=start, first_line=first + 1, lines=lines)


def _groups(folder: Path) -> list[list[str]]:
    groups: dict[str, list[str]] = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_file() and modality_of(name) and not path.name.startswith("."):
            groups.setdefault(name.rpartition(".")[0], []).append(name)
    return list(groups.values())

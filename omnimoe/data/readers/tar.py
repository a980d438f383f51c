"""WebDataset shards: tar files in which members of one name but for the ending are one row.

Read with the standard library. The `webdataset` package reads the same files, but cannot be resumed in the middle of an
epoch (its issues 234 and 271 say so); here where a row lies is two integers, and skipping reads headers alone.
"""

from __future__ import annotations

import glob
import hashlib
import json
import os
import re
import tarfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from omnimoe.data.readers.base import Document, DocumentError, Item, RawFile, Reader
from omnimoe.data.readers.fields import modality_of, to_document

_RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")


class TarReader(Reader):
    """Rows of tar files, one shard a file.

    The name of a row is its path up to the first dot of the file name, the field is what follows: ``0001.jpg``,
    ``0001.txt``, ``0001.wav``, ``0001.json``. Fields of a JSON member are those of a row, see
    :func:`omnimoe.data.readers.fields.to_document`; it names other members by their field, such as
    ``{"spans": ["a lion", {"image": "0.png"}]}`` for ``0001.0.png``.

    Args:
        shards: a path, a pattern such as ``"train-{000..012}.tar"`` or ``"train-*.tar"``, or several.
        columns: modality to the name of its field.

    Raises:
        DocumentError: if a file is missing or nothing matches.
    """

    def __init__(
        self,
        shards: str | os.PathLike[str] | Iterable[str | os.PathLike[str]],
        columns: Mapping[str, str] | None = None,
    ) -> None:
        given = [shards] if isinstance(shards, str | os.PathLike) else list(shards)
        self.files = [Path(path) for one in given for path in _expanded(os.path.expanduser(os.fspath(one)))]
        missing = [str(path) for path in self.files if not path.is_file()]
        if missing or not self.files:
            raise DocumentError(f"there is no shard {missing[0] if missing else given}; pass tar files or a pattern")
        self.columns = dict(columns or {})
        self.num_shards = len(self.files)
        sizes = [(path.name, path.stat().st_size) for path in self.files]
        self.identity = f"tar {hashlib.sha256(json.dumps([sizes, self.columns]).encode()).hexdigest()}"

    def read(self, shard: int, start: int = 0) -> Iterator[Item]:
        path = self.files[shard]
        try:
            with tarfile.open(path) as tar:
                for index, (name, members) in enumerate(_rows(tar)):
                    if index < start:
                        continue
                    content = {field: _bytes(tar, member) for field, member in members.items()}
                    yield Item(shard=shard, index=index, where=f"{path}, {name}", content=content)
        except (tarfile.TarError, EOFError, OSError) as error:
            raise DocumentError(f"{path} cannot be read as a tar file: {error}") from None

    def document(self, item: Item) -> Document:
        members: dict[str, bytes] = item.content
        fields: dict[str, Any] = {}
        for field, data in members.items():
            if field == "json":
                try:
                    said = json.loads(data)
                except ValueError as error:
                    raise DocumentError(f"{item.where}: .json is not JSON: {error}") from None
                if isinstance(said, dict):
                    fields.update(said)
        if not any(isinstance(value, list) for value in fields.values()):
            for field, data in members.items():
                modality = modality_of(field)
                if modality == "text":
                    try:
                        fields["text"] = data.decode("utf-8").strip()
                    except UnicodeDecodeError as error:
                        raise DocumentError(f"{item.where}: .{field} is not UTF-8: {error}") from None
                elif modality is not None:
                    fields.setdefault(modality, field)

        def find(name: str) -> RawFile:
            if name not in members:
                raise DocumentError(f"{item.where}: has no member {name!r}, only {', '.join(members)}")
            return RawFile(name=f".{name}", data=members[name])

        return to_document(fields, item.where, find, self.columns)


def _rows(tar: tarfile.TarFile) -> Iterator[tuple[str, dict[str, tarfile.TarInfo]]]:
    name = ""
    members: dict[str, tarfile.TarInfo] = {}
    while (member := tar.next()) is not None:
        # The archive remembers every member it saw, which would grow with the shard.
        tar.members = []  # type: ignore[attr-defined]
        if not member.isfile():
            continue
        folder, _, file = member.name.rpartition("/")
        stem, _, field = file.partition(".")
        if not stem or not field:
            continue
        row = f"{folder}/{stem}" if folder else stem
        if row != name and members:
            yield name, members
            members = {}
        name = row
        members[field.lower()] = member
    if members:
        yield name, members


def _bytes(tar: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    file = tar.extractfile(member)
    return file.read() if file is not None else b""


def _expanded(pattern: str) -> list[str]:
    found = _RANGE.search(pattern)
    if found:
        first, last = found.groups()
        numbers = (str(number).zfill(len(first)) for number in range(int(first), int(last) + 1))
        return [
            path for number in numbers for path in _expanded(pattern[: found.start()] + number + pattern[found.end() :])
        ]
    return sorted(glob.glob(pattern)) if glob.has_magic(pattern) else [pattern]

"""Hugging Face datasets: local Arrow and Parquet files or names on the Hub, map-style or streaming.

Pictures and sound stay undecoded until they are used: the library would decode sound with torchcodec, which needs an
installed FFmpeg, and here it is read with soundfile.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from omnimoe.data.readers.base import Document, DocumentError, Item, RawFile, Reader
from omnimoe.data.readers.fields import COLUMNS, to_document

_ROWS_A_SHARD = 1000


class DatasetReader(Reader):
    """Rows of a dataset.

    Args:
        dataset: a ``datasets.Dataset`` or ``IterableDataset``; or a name for :meth:`load`.
        columns: modality to the name of its column; None for columns of pictures and sound by their type, and text by
            the usual names of :data:`omnimoe.data.readers.fields.COLUMNS`.
        name: for messages.

    Raises:
        DocumentError: if it is not a dataset.
        ImportError: if the library is not installed.
    """

    def __init__(self, dataset: Any, columns: Mapping[str, str] | None = None, name: str = "dataset") -> None:
        datasets = _library()
        if not isinstance(dataset, datasets.Dataset | datasets.IterableDataset):
            raise DocumentError(
                f"{name} is a {type(dataset).__name__}, not a Dataset or IterableDataset; "
                "choose one split of a dictionary of them"
            )
        self.name, self.columns = name, dict(columns or {})
        for column, feature in dict(dataset.features or {}).items():
            for modality, kind in (("image", datasets.Image), ("speech", datasets.Audio)):
                if isinstance(feature, kind):
                    dataset = dataset.cast_column(column, kind(decode=False))
                    if column not in COLUMNS[modality]:
                        self.columns.setdefault(modality, column)
        self.dataset = dataset
        self.is_streaming = isinstance(dataset, datasets.IterableDataset)
        if self.is_streaming:
            self.num_shards = dataset.num_shards
            said = f"{self.num_shards} {sorted(dataset.features or {})}"
        else:
            self.num_shards = max(1, -(-len(dataset) // _ROWS_A_SHARD))
            said = f"{len(dataset)} {dataset.column_names} {dataset._fingerprint}"
        self.identity = f"dataset {hashlib.sha256(f'{said} {self.columns}'.encode()).hexdigest()}"

    @classmethod
    def load(
        cls,
        name: str | os.PathLike[str],
        *,
        split: str = "train",
        streaming: bool = False,
        columns: Mapping[str, str] | None = None,
    ) -> DatasetReader:
        """Opens a dataset by its name on the Hub, or a local folder or file.

        Args:
            name: a Hub name; a folder of ``save_to_disk``; a folder of ``*.parquet`` or ``*.arrow``, or one such file.
            split: of a dataset that has several.
            streaming: do not fetch or convert it first.
            columns: as above.

        Raises:
            DocumentError: if it cannot be loaded.
        """
        datasets = _library()
        path = Path(name).expanduser()
        try:
            if (path / "state.json").is_file() or (path / "dataset_dict.json").is_file():
                loaded = datasets.load_from_disk(str(path))
                loaded = loaded[split] if isinstance(loaded, datasets.DatasetDict) else loaded
                loaded = loaded.to_iterable_dataset() if streaming else loaded
            elif path.exists():
                kind, files = _table_files(path, split)
                loaded = datasets.load_dataset(kind, data_files={split: files}, split=split, streaming=streaming)
            else:
                loaded = datasets.load_dataset(str(name), split=split, streaming=streaming)
        except (OSError, ValueError, KeyError, RuntimeError) as error:
            raise DocumentError(f"dataset {name} cannot be loaded: {error}") from None
        return cls(loaded, columns, name=str(name))

    def read(self, shard: int, start: int = 0) -> Iterator[Item]:
        if self.is_streaming:
            part = self.dataset.shard(num_shards=self.num_shards, index=shard) if self.num_shards > 1 else self.dataset
            rows = enumerate(part.skip(start) if start else part, start)
        else:
            first = shard * _ROWS_A_SHARD
            count = min(_ROWS_A_SHARD, len(self.dataset) - first)
            rows = ((index, self.dataset[first + index]) for index in range(start, count))
        for index, row in rows:
            number = index if self.is_streaming else shard * _ROWS_A_SHARD + index
            where = f"{self.name}, row {number}" + (f" of shard {shard}" if self.is_streaming else "")
            yield Item(shard=shard, index=index, where=where, content=row)

    def document(self, item: Item) -> Document:
        def find(name: str) -> RawFile:
            return RawFile(name=name, path=Path(name))

        fields = {key: value for key, value in item.content.items() if value is not None}
        present = {modality: column for modality, column in self.columns.items() if column in fields}
        return to_document(fields, item.where, find, present)


def _table_files(path: Path, split: str) -> tuple[str, list[str]]:
    for kind in ("parquet", "arrow"):
        files = sorted(path.rglob(f"*.{kind}")) if path.is_dir() else [path] if path.suffix == f".{kind}" else []
        of_split = [file for file in files if split in file.relative_to(path).as_posix()] if path.is_dir() else files
        if files:
            return kind, [str(file) for file in of_split or files]
    raise DocumentError(f"{path} holds neither a saved dataset nor parquet or arrow files")


def _library() -> Any:
    try:
        import datasets
    except ImportError:
        raise ImportError("datasets is not installed: pip install 'omnimoe[datasets]'") from None
    return datasets

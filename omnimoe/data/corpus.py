"""A tokenized corpus in memory: token ids of texts, pictures and clips, a table of rows, and their splits.

On disk it is ``tokens.npz`` (integers only, never pickled) and ``corpus.json``; set P ships with the package in that
form. A row joins a text with a picture and a clip where there are any; several rows may share one.
"""

from __future__ import annotations

import dataclasses
import json
import os
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from importlib.resources import as_file, files
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from omnimoe.data.arrays import (
    CorpusError,
    Interleaved,
    Ragged,
    Version,
    read_interleaved,
    read_ragged,
    read_versions,
)
from omnimoe.data.splits import SPLITS

if TYPE_CHECKING:
    from omnimoe.tokenizers.base import Tokenizer

MODALITIES = ("text", "image", "speech")
FORMAT = 1
_ROW_COLUMNS = ("text", "image", "audio", "split", "group", "lang", "source", "style")
_OPTIONAL_COLUMNS = ("topic",)
_DOCUMENT_COLUMNS = ("text", "split", "source")


@dataclass(frozen=True, kw_only=True)
class Example:
    """One row: local ids ``(n,)`` int64 of each modality, or None where the row has none.

    ``split``, ``lang``, ``source`` and ``style`` are names, ``group`` is the number of the component that shares a
    split, ``index`` the row in the table.
    """

    index: int
    split: str
    lang: str
    source: str
    style: str
    group: int
    text: np.ndarray
    image: np.ndarray | None
    speech: np.ndarray | None

    def get(self, modality: str) -> np.ndarray | None:
        """Ids of ``"text"``, ``"image"`` or ``"speech"``."""
        if modality not in MODALITIES:
            raise CorpusError(f"unknown modality {modality!r}; a row has {', '.join(MODALITIES)}")
        return getattr(self, modality)


@dataclass(frozen=True, kw_only=True)
class Corpus:
    """Token ids and tables of one corpus. Make one with :meth:`load`.

    Args:
        name: its name.
        texts: local ids of all texts, captions first.
        images: ``(n, 64)`` local ids of the pictures.
        clips: local ids of the clips.
        rows: column name to ``(rows,)`` int32: indices into the above (-1 for none) and into the names of ``meta``;
            ``topic`` only where the corpus has topics.
        documents: the same for running text.
        interleaved: documents whose spans have an order, if there are any.
        meta: names of splits, languages, sources and styles, vocabulary sizes, grid and rates.
        versions: for training, which takes another one each pass: the pictures and clips of the train split, varied.
    """

    name: str
    texts: Ragged
    images: np.ndarray
    clips: Ragged
    rows: dict[str, np.ndarray] = field(repr=False)
    documents: dict[str, np.ndarray] = field(repr=False)
    meta: dict[str, Any] = field(repr=False)
    interleaved: Interleaved | None = field(default=None, repr=False)
    versions: tuple[Version, ...] = field(default=(), repr=False)

    @classmethod
    def load(cls, name: str | os.PathLike[str] = "p") -> Self:
        """Loads a shipped corpus by name, or a folder.

        Args:
            name: ``"p"``, or a folder written by ``tokenize_corpus`` or ``build_corpus``; a built folder is tokenized
                on the first call (minutes) and the result kept in its subfolder ``tokens``. Or data of one's own, as
                :func:`omnimoe.data.readers.open_reader` takes them: built on the first call, and kept in the cache.

        Raises:
            CorpusError: if there is none, or the files are damaged.
        """
        if isinstance(name, str) and name.lower() in shipped_corpora():
            with as_file(files("omnimoe.data") / "shipped" / name.lower()) as folder:
                return cls._read(folder)
        folder = Path(name).expanduser()
        if not any((folder / file).is_file() for file in ("tokens.npz", "corpus.json", "rows.jsonl")):
            folder = _own(name, folder)
        if not folder.is_dir():
            raise CorpusError(
                f"no corpus {str(name)!r}: neither a folder nor one of those shipped: "
                f"{', '.join(shipped_corpora()) or 'none'}"
            )
        if not (folder / "tokens.npz").exists() and (folder / "rows.jsonl").exists():
            from omnimoe.data.tokenize import tokenize_corpus

            if not (folder / "tokens" / "tokens.npz").exists():
                tokenize_corpus(folder, folder / "tokens")
            folder = folder / "tokens"
        return cls._read(folder)

    @classmethod
    def _read(cls, folder: Path) -> Self:
        try:
            meta = json.loads((folder / "corpus.json").read_text(encoding="utf-8"))
            with np.load(folder / "tokens.npz", allow_pickle=False) as stored:
                arrays = {key: stored[key] for key in stored.files}
        except FileNotFoundError as error:
            raise CorpusError(
                f"{folder} is not a corpus: {Path(error.filename).name} is missing; write one with tokenize_corpus"
            ) from None
        except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
            raise CorpusError(f"{folder} is damaged: {error}; write it anew with tokenize_corpus") from None
        if meta.get("format") != FORMAT:
            raise CorpusError(
                f"{folder} has format {meta.get('format')!r}, this version reads {FORMAT}; tokenize the corpus anew"
            )
        try:
            corpus = cls(
                name=meta["name"],
                texts=read_ragged(arrays, "text"),
                images=arrays["image_values"].astype(np.int64),
                clips=read_ragged(arrays, "speech"),
                rows={
                    key: arrays[f"row_{key}"].astype(np.int32)
                    for key in (*_ROW_COLUMNS, *(key for key in _OPTIONAL_COLUMNS if f"row_{key}" in arrays))
                },
                documents={key: arrays[f"document_{key}"].astype(np.int32) for key in _DOCUMENT_COLUMNS},
                meta=meta,
                interleaved=read_interleaved(arrays),
                versions=read_versions(arrays),
            )
        except KeyError as error:
            raise CorpusError(f"{folder} is damaged: {error} is missing; write it anew with tokenize_corpus") from None
        corpus._check(folder)
        return corpus

    def __len__(self) -> int:
        return len(self.rows["text"])

    def version(self, number: int) -> Self:
        """The corpus with the tokens of a version; 0 is the corpus itself, and past the last one they begin anew."""
        number %= 1 + len(self.versions)
        if not number:
            return self
        held = self.versions[number - 1]
        return dataclasses.replace(self, images=held.images, clips=held.clips, versions=())

    def interleaved_spans(self, index: int) -> list[tuple[str, np.ndarray]]:
        """Modality and local ids of the spans of an interleaved document."""
        if self.interleaved is None or not 0 <= index < len(self.interleaved):
            count = 0 if self.interleaved is None else len(self.interleaved)
            raise CorpusError(f"there is no interleaved document {index}; the corpus has {count}")
        held = (self.texts, self.images, self.clips)
        kinds, items = self.interleaved.kinds[index].tolist(), self.interleaved.items[index].tolist()
        return [(MODALITIES[kind], held[kind][item]) for kind, item in zip(kinds, items, strict=True)]

    def __getitem__(self, index: int) -> Example:
        image, audio = int(self.rows["image"][index]), int(self.rows["audio"][index])
        return Example(
            index=index,
            split=SPLITS[self.rows["split"][index]],
            lang=self._name("languages", self.rows["lang"][index]),
            source=self._name("sources", self.rows["source"][index]),
            style=self._name("styles", self.rows["style"][index]),
            group=int(self.rows["group"][index]),
            text=self.texts[int(self.rows["text"][index])],
            image=self.images[image] if image >= 0 else None,
            speech=self.clips[audio] if audio >= 0 else None,
        )

    @property
    def vocab_sizes(self) -> dict[str, int]:
        """Modality to number of local ids."""
        return dict(self.meta["vocab_sizes"])

    @property
    def grids(self) -> dict[str, tuple[int, int]]:
        """Modality to ``(rows, columns)`` of a span, for those laid out in space."""
        return {key: (int(rows), int(columns)) for key, (rows, columns) in self.meta["grids"].items()}

    @property
    def main_languages(self) -> tuple[str, ...] | None:
        """What :meth:`select` is to be asked for where nobody named a language: English, or all where there is none."""
        return ("en",) if "en" in self.meta["languages"] else None

    def select(
        self,
        split: str,
        *,
        languages: Sequence[str] | None = ("en",),
        sources: Sequence[str] | None = None,
        having: Sequence[str] = ("text",),
    ) -> np.ndarray:
        """Rows of a split.

        Args:
            split: ``"train"``, ``"val"``, ``"test"`` or ``"drawing"``.
            languages: languages of the text; None for all.
            sources: sources such as ``"emoji"``; None for all.
            having: modalities a row must have.

        Returns:
            ``(n,)`` int64 indices, ascending; empty if there are none.

        Raises:
            CorpusError: if a name is unknown.
        """
        keep = self.rows["split"] == _index(SPLITS, split, "split")
        if languages is not None:
            keep &= np.isin(self.rows["lang"], [_index(self.meta["languages"], name, "language") for name in languages])
        if sources is not None:
            keep &= np.isin(self.rows["source"], [_index(self.meta["sources"], name, "source") for name in sources])
        for modality in having:
            column = {"text": "text", "image": "image", "speech": "audio"}.get(modality)
            if column is None:
                raise CorpusError(f"unknown modality {modality!r}; a row has {', '.join(MODALITIES)}")
            keep &= self.rows[column] >= 0
        return np.flatnonzero(keep)

    def select_documents(self, split: str, *, sources: Sequence[str] | None = None) -> np.ndarray:
        """Running text of a split, ``(n,)`` int64 indices into :attr:`documents`; ``drawing`` has none."""
        keep = self.documents["split"] == _index(SPLITS, split, "split")
        if sources is not None:
            keep &= np.isin(
                self.documents["source"], [_index(self.meta["sources"], name, "source") for name in sources]
            )
        return np.flatnonzero(keep)

    def examples(self, split: str, **choice: Any) -> Iterator[Example]:
        """The rows of a split as :class:`Example`, in order; ``choice`` as in :meth:`select`."""
        return (self[int(index)] for index in self.select(split, **choice))

    def captions(self, split: str, **choice: Any) -> list[str]:
        """The distinct captions of a split as text, in order of appearance; ``choice`` as in :meth:`select`."""
        from omnimoe.tokenizers.base import load_tokenizer

        tokenizer = load_tokenizer("text")
        chosen = dict.fromkeys(self.rows["text"][self.select(split, **choice)].tolist())
        return list(dict.fromkeys(tokenizer.decode(self.texts[index]) for index in chosen))

    def summary(self) -> dict[str, dict[str, int]]:
        """Split to counts: rows, those of :attr:`main_languages` with all three modalities, concepts, pictures, clips,
        running tokens."""
        counts = {}
        for number, split in enumerate(SPLITS):
            rows = self.rows["split"] == number
            triples = self.select(split, languages=self.main_languages, having=MODALITIES)
            texts = self.documents["text"][self.documents["split"] == number]
            counts[split] = {
                "rows": int(rows.sum()),
                "triples": len(triples),
                "groups": len(np.unique(self.rows["group"][triples])),
                "pictures": len(np.unique(self.rows["image"][rows & (self.rows["image"] >= 0)])),
                "clips": len(np.unique(self.rows["audio"][triples])),
                "running_text_tokens": int(self.texts.lengths[texts].sum()),
            }
        return counts

    def as_leak_rows(self, tokenizer: Tokenizer | None = None) -> Iterator[dict[str, Any]]:
        """The table in the form that :func:`omnimoe.data.splits.check_leaks` reads.

        Args:
            tokenizer: the text tokenizer the corpus was made with, to compare captions as text, thus loosely too;
                None compares their ids, thus exactly.
        """
        written: dict[int, str] = {}
        for index in range(len(self)):
            row = self[index]
            text = int(self.rows["text"][index])
            if text not in written:
                written[text] = row.text.tobytes().hex() if tokenizer is None else tokenizer.decode(row.text)
            yield {
                "split": row.split,
                "key": f"group {row.group}",
                "group": row.group,
                "lang": row.lang,
                "text": written[text],
                "image": int(self.rows["image"][index]),
                "audio": int(self.rows["audio"][index]),
            }

    def _name(self, kind: str, index: int) -> str:
        return self.meta[kind][int(index)]

    def _check(self, folder: Path) -> None:
        sizes = self.vocab_sizes
        bounds = (("text", self.texts.values), ("image", self.images), ("speech", self.clips.values))
        for modality, values in bounds:
            if values.size and not 0 <= int(values.min()) <= int(values.max()) < sizes[modality]:
                raise CorpusError(
                    f"{folder} has a {modality} id {int(values.max())}, its vocabulary has "
                    f"{sizes[modality]}; tokenize the corpus anew"
                )
        for version in self.versions:
            same = version.images.shape == self.images.shape and len(version.clips) == len(self.clips)
            if not same or (version.clips.lengths > self.clips.lengths).any():
                raise CorpusError(f"{folder} has versions of other pictures and clips; tokenize the corpus anew")
            dataclasses.replace(self, images=version.images, clips=version.clips, versions=())._check(folder)
        limits = {"text": len(self.texts), "image": len(self.images), "audio": len(self.clips), "split": len(SPLITS)}
        for key, limit in limits.items():
            if len(self) and not -1 <= int(self.rows[key].min()) <= int(self.rows[key].max()) < limit:
                raise CorpusError(
                    f"{folder} has a row with {key} {int(self.rows[key].max())}, there are {limit}; "
                    "tokenize the corpus anew"
                )


def _own(name: str | os.PathLike[str], folder: Path) -> Path:
    """The folder built of data of one's own; ``folder`` itself if there are none."""
    from omnimoe.data.own import cached_corpus
    from omnimoe.data.readers.base import DocumentError

    source = os.fspath(name)
    if not (folder.exists() or source.startswith("hub:") or ".tar" in source):
        return folder
    try:
        return cached_corpus(source)
    except DocumentError as error:
        raise CorpusError(f"{name} is neither a corpus nor data to make one of: {error}") from None


def shipped_corpora() -> list[str]:
    """Names of the corpora that come with the package."""
    folder = files("omnimoe.data") / "shipped"
    return (
        sorted(entry.name for entry in folder.iterdir() if (entry / "tokens.npz").is_file()) if folder.is_dir() else []
    )


def _index(names: Sequence[str], name: str, kind: str) -> int:
    if name not in names:
        raise CorpusError(f"unknown {kind} {name!r}; this corpus has {', '.join(names)}")
    return list(names).index(name)

"""Data of one's own to a corpus folder of the same form as the public sets: split without leaks, then tokenized.

A text with a picture or a clip is a row. A text alone is running text. Everything else, spans with an order above all,
is an interleaved document.
"""

from __future__ import annotations

import collections
import hashlib
import json
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from PIL import Image
from tqdm import tqdm

from omnimoe.data.pictures import IMAGE_SIZES, SIDE, to_square
from omnimoe.data.readers import Document, DocumentError, Reader, open_reader
from omnimoe.data.sources import cache_folder
from omnimoe.data.speech import SAMPLE_RATE, to_clip
from omnimoe.data.splits import SPLITS, assign_splits, concept_key
from omnimoe.data.store import CorpusStore, new_folder, write_lines
from omnimoe.data.stream import ON_ERROR

logger = logging.getLogger(__name__)

_LONGEST = 30 * SAMPLE_RATE


def build_own(
    source: Any,
    out: str | os.PathLike[str],
    *,
    image_size: int = SIDE,
    columns: Mapping[str, str] | None = None,
    on_error: str = "raise",
) -> Path:
    """Builds a corpus folder, as :func:`omnimoe.data.build_corpus` does, of documents of one's own.

    Where the data name no splits, rows are split by component: what shares a text, picture, clip or ``key`` stays
    together. Interleaved documents are written to ``interleaved.jsonl``.

    Args:
        source: as :func:`omnimoe.data.readers.open_reader` takes it.
        out: folder to make; it must not exist, or be empty.
        image_size: height and width of the pictures, 64 or 128; they are set on white squares.
        columns: modality to the name of its field.
        on_error: ``"raise"``, or ``"skip"`` to leave out what cannot be read and say how much it was.

    Returns:
        The folder.

    Raises:
        DocumentError: if a document cannot be read, or there is none.
        ValueError: if an argument is out of range, or the folder holds something.
    """
    if image_size not in IMAGE_SIZES:
        raise ValueError(f"image_size must be {' or '.join(map(str, IMAGE_SIZES))}, got {image_size!r}")
    if on_error not in ON_ERROR:
        raise ValueError(f"on_error must be {' or '.join(ON_ERROR)}, got {on_error!r}")
    out = Path(out).expanduser()
    # Listed before the working folder is there, which may lie within the source.
    reader = open_reader(source, columns)
    told = source if isinstance(source, str | os.PathLike) else type(source).__name__
    with new_folder(out) as work:
        _collect(reader, work, image_size, on_error, out.name, os.fspath(told))
    return out


def cached_corpus(source: str) -> Path:
    """The corpus folder of a source, built on the first call; a source that changed is built anew.

    Raises:
        DocumentError: if a document cannot be read.
    """
    reader = open_reader(source)
    path = Path(source).expanduser()
    # Pictures that were painted over keep their names; the newest file tells.
    newest = max((file.stat().st_mtime_ns for file in path.rglob("*")), default=0) if path.is_dir() else 0
    digest = hashlib.sha256(f"{path.resolve()} {reader.identity} {newest}".encode()).hexdigest()[:16]
    folder = cache_folder().parent / "own" / f"{path.name}-{digest}"
    return folder if (folder / "rows.jsonl").is_file() else build_own(source, folder)


def _collect(reader: Reader, work: Path, side: int, on_error: str, name: str, told: str) -> None:
    store = CorpusStore(side, _LONGEST)
    documents: list[dict[str, Any]] = []
    interleaved: list[dict[str, Any]] = []
    counts: collections.Counter[str] = collections.Counter()
    items = (item for shard in range(reader.num_shards) for item in reader.read(shard))
    for item in tqdm(items, desc="documents", disable=None):
        try:
            document = reader.document(item)
            spans = _filed(document, store)
        except DocumentError as error:
            if on_error == "raise":
                raise
            counts["left out"] += 1
            if counts["left out"] <= 5:
                logger.warning("left out: %s", error)
            continue
        _sort_in(document, spans, store, documents, interleaved)
    if counts["left out"]:
        logger.warning("%d documents could not be read and were left out", counts["left out"])
    if not (store.rows or documents or interleaved):
        raise DocumentError(f"{told} has no document that can be read")
    own_splits = _split(store, documents, interleaved)
    store.write(work, documents)
    if interleaved:
        write_lines(work / "interleaved.jsonl", interleaved)
    languages = sorted({row["lang"] for row in store.rows} or {"en"})
    about = {
        "name": name,
        "image_size": side,
        "permissive": False,
        "languages": languages,
        "told": "all",
        "own_splits": own_splits,
    }
    (work / "about.json").write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")
    (work / "LICENSES.md").write_text(
        f"# Sources and licences\n\nMade of {Path(told).name}, {len(store.rows)} rows, {len(documents)} texts and "
        f"{len(interleaved)} interleaved documents. Under which licences these may be used and passed on was not "
        "stated; whoever built the corpus knows.\n",
        encoding="utf-8",
    )


def _filed(document: Document, store: CorpusStore) -> list[dict[str, Any]]:
    """The spans with pictures and clips filed: ``{"text": ...}``, ``{"image": index}``, ``{"audio": index}``."""
    spans: list[dict[str, Any]] = []
    for modality, raw in document.decoded():
        if modality == "text":
            if not raw.strip():
                raise DocumentError(f"{document.where}: the text is empty")
            spans.append({"text": raw})
        elif modality == "image":
            picture = raw if isinstance(raw, Image.Image) else Image.fromarray(raw)
            spans.append({"image": store.picture(to_square(picture, store.side))})
        elif modality == "video":
            raise DocumentError(
                f"{document.where}: a built corpus holds no video; read the source with omnimoe.data.StreamedSequences"
            )
        else:
            index = store.clip(to_clip(*raw))
            if index < 0:
                seconds = len(raw[0]) / raw[1]
                raise DocumentError(
                    f"{document.where}: the clip has {seconds:.2f} seconds; one has 0.1 to {_LONGEST // SAMPLE_RATE}"
                )
            spans.append({"audio": index})
    return spans


def _sort_in(
    document: Document, spans: list[dict[str, Any]], store: CorpusStore, documents: list, interleaved: list
) -> None:
    fields = document.fields
    common: dict[str, Any] = {"lang": fields.get("lang", "en"), "license": ""}
    if "split" in fields:
        common["split"] = fields["split"]
    kinds = [kind for span in spans for kind in span]
    held = {kind: value for span in spans for kind, value in span.items()}
    if not document.is_ordered and len(kinds) > 1 and "text" in kinds:
        key = fields.get("key") or concept_key(held["text"])
        extra = {"topic": fields["topic"]} if "topic" in fields else {}
        store.row(source="own", style="", key=key, **held, **common, **extra)
        return
    # No words, for words in a key count as the name of a thing.
    key = fields.get("key") or hashlib.sha1(os.fsencode(document.where)).hexdigest()
    if set(kinds) == {"text"}:
        text = "".join(span["text"] for span in spans)
        documents.append({"source": "own", "key": key, "text": text, "heads": [], **common})
    else:
        interleaved.append({"source": "own", "key": key, "spans": spans, **common})


def _split(store: CorpusStore, documents: list, interleaved: list) -> bool:
    """Writes ``split`` and ``group`` everywhere; whether the data named splits themselves."""
    # Rows for the sake of the split alone: one for the words of a document, one for each picture and clip. They have no
    # language, for a long text is no name of a thing, and a phrase that two documents share is no reason to join them.
    empty = {"image": -1, "audio": -1, "lang": ""}
    parts = []
    for number, line in enumerate((*interleaved, *documents)):
        spans = line.get("spans") or [{"text": line["text"]}]
        words = "".join(span.get("text", "") for span in spans) or line["key"]
        for span in ({}, *(span for span in spans if "text" not in span)):
            parts.append({**empty, "text": words, **span, "key": line["key"], "of": number})
    every = [*store.rows, *interleaved, *documents]
    named = any("split" in line for line in every)
    if named:
        for line in every:
            line.setdefault("split", "train")
        for row in store.rows:
            row["group"] = row["key"]
        return True
    assign_splits([*store.rows, *parts], look_alikes=store.fingerprints)
    _fill_val([*store.rows, *parts])
    for part in parts:
        line = (*interleaved, *documents)[part["of"]]
        # A drawing held out of a document would tear it.
        line["split"] = "train" if part["split"] == "drawing" else part["split"]
    return False


def _fill_val(rows: list[dict[str, Any]]) -> None:
    """Where few components left ``val`` without any, a tenth of those of ``train`` move there, at least one."""
    # Words alone do not tell how a model does with pictures.
    shown = [row for row in rows if row["image"] >= 0 or row["audio"] >= 0] or rows
    groups = {row["group"] for row in shown if row["split"] in ("train", "drawing")}
    if any(row["split"] == "val" for row in shown) or len(groups) < 2:
        return
    chosen = sorted(groups, key=lambda group: hashlib.sha1(group.encode()).digest())[: max(1, len(groups) // 10)]
    for row in rows:
        if row["group"] in chosen:
            row["split"] = SPLITS[1]

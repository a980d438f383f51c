"""A built folder to token ids: the form in which set P ships, about a hundredth of the size."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from omnimoe.data.arrays import PARTS, CorpusError
from omnimoe.data.corpus import FORMAT, MODALITIES
from omnimoe.data.splits import SPLITS, LeakError, check_leaks
from omnimoe.data.variation import vary_clip, vary_picture
from omnimoe.tokenizers.base import SHIPPED, Tokenizer, load_tokenizer

logger = logging.getLogger(__name__)

TOKENIZERS = {name: SHIPPED[name] for name in MODALITIES}
LANGUAGES = ("en", "de", "es", "fr", "it", "nl", "pt")


def tokenize_corpus(
    folder: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    tokenizers: Mapping[str, Tokenizer] | None = None,
    languages: Sequence[str] | None = (),
    name: str | None = None,
    versions: int = 0,
) -> Path:
    """Encodes a folder of ``build_corpus``: ``tokens.npz``, ``corpus.json``, ``LICENSES.md`` and ``ATTRIBUTION``.

    Args:
        folder: the built folder.
        out: folder to write, made if need be.
        tokenizers: ``{"text": ..., "image": ..., "speech": ...}``; None for the shipped ones.
        languages: languages of the rows to keep; None for all, empty for those that the folder's ``about.json`` names,
            :data:`LANGUAGES` where it names none.
        name: name of the corpus; None for that of ``about.json``.
        versions: encode so many varied versions of the pictures and clips of the train split too, of which training
            takes another one each pass; see :mod:`omnimoe.data.variation`.

    Returns:
        ``out``.

    Raises:
        CorpusError: if the folder is not a built corpus, or ``versions`` is negative.
        LeakError: if its splits overlap, or an entry of train defines a held-out concept.
    """
    folder, out = Path(folder).expanduser(), Path(out).expanduser()
    if not (folder / "rows.jsonl").is_file():
        raise CorpusError(f"{folder} is not a built corpus: rows.jsonl is missing; run build_corpus first")
    if versions < 0:
        raise CorpusError(f"versions must be 0 or more, got {versions}")
    if tokenizers is None:
        tokenizers = {modality: load_tokenizer(known) for modality, known in TOKENIZERS.items()}
    about = _about(folder)
    if languages is not None and not languages:
        languages = about.get("languages", LANGUAGES)
    rows = [row for row in _lines(folder / "rows.jsonl") if languages is None or row["lang"] in languages]
    documents = _lines(folder / "text.jsonl")
    _check(rows, documents, about)
    interleaved = _lines(folder / "interleaved.jsonl") if (folder / "interleaved.jsonl").is_file() else []
    parts = [(kind, value) for line in interleaved for span in line["spans"] for kind, value in span.items()]

    written = [value for kind, value in parts if kind == "text"]
    texts = list(dict.fromkeys([row["text"] for row in rows] + [document["text"] for document in documents] + written))
    text_index = {text: i for i, text in enumerate(texts)}
    encoded = encode_all(tokenizers["text"], texts, "text")
    pictures, picture_index = _used(rows, parts, "image")
    clips, clip_index = _used(rows, parts, "audio")
    images = np.load(folder / "images.npy", mmap_mode="r")
    _tell_size(images, tokenizers["image"])
    audio, offsets = np.load(folder / "audio.npy", mmap_mode="r"), np.load(folder / "audio_offsets.npy")
    sounds = [np.asarray(audio[offsets[i] : offsets[i + 1]]) for i in clips]
    codes = encode_all(tokenizers["image"], [images[i] for i in pictures], "pictures")
    units = encode_all(tokenizers["speech"], sounds, "speech")
    shown = sorted({picture_index[row["image"]] for row in rows if row["split"] == "train" and row["image"] >= 0})
    heard = sorted({clip_index[row["audio"]] for row in rows if row["split"] == "train" and row["audio"] >= 0})
    varied: dict[str, np.ndarray] = {}
    for number in range(1, versions + 1):
        drawn = [vary_picture(images[pictures[i]], np.random.default_rng([number, 0, i])) for i in shown]
        seen = dict(zip(shown, encode_all(tokenizers["image"], drawn, f"pictures, version {number}"), strict=True))
        other = [seen.get(i, held) for i, held in enumerate(codes)]
        varied[f"image_{number}_values"] = _codes(other, tokenizers["image"])
        faster = [vary_clip(sounds[i], np.random.default_rng([number, 1, i])) for i in heard]
        said = dict(zip(heard, encode_all(tokenizers["speech"], faster, f"speech, version {number}"), strict=True))
        varied |= ragged(f"speech_{number}", [said.get(i, held) for i, held in enumerate(units)])

    names = {
        "languages": _names(rows, "lang"),
        "styles": _names(rows, "style"),
        "sources": sorted({row["source"] for row in rows} | {document["source"] for document in documents}),
        "groups": _names(rows, "group"),
        "topics": sorted({row["topic"] for row in rows if row.get("topic")}),
    }
    place = {kind: {value: i for i, value in enumerate(values)} for kind, values in names.items()}
    arrays: dict[str, Any] = {
        **ragged("text", encoded),
        **ragged("speech", units),
        "image_values": _codes(codes, tokenizers["image"]),
        "row_text": _column(text_index[row["text"]] for row in rows),
        "row_image": _column(picture_index.get(row["image"], -1) for row in rows),
        "row_audio": _column(clip_index.get(row["audio"], -1) for row in rows),
        "row_split": _column(SPLITS.index(row["split"]) for row in rows),
        "row_group": _column(place["groups"][row["group"]] for row in rows),
        "row_lang": _column(place["languages"][row["lang"]] for row in rows),
        "row_source": _column(place["sources"][row["source"]] for row in rows),
        "row_style": _column(place["styles"][row["style"]] for row in rows),
        "row_topic": _column(place["topics"].get(row.get("topic"), -1) for row in rows),
        "document_text": _column(text_index[document["text"]] for document in documents),
        "document_split": _column(SPLITS.index(document["split"]) for document in documents),
        "document_source": _column(place["sources"][document["source"]] for document in documents),
        **varied,
    }
    if interleaved:
        index = {"text": text_index, "image": picture_index, "audio": clip_index}
        arrays["interleaved_kind"] = _column(PARTS.index(kind) for kind, _ in parts)
        arrays["interleaved_item"] = _column(index[kind][value] for kind, value in parts)
        arrays["interleaved_lengths"] = _column(len(line["spans"]) for line in interleaved)
        arrays["interleaved_split"] = _column(SPLITS.index(line["split"]) for line in interleaved)
    out.mkdir(parents=True, exist_ok=True)
    partial = out / "tokens.partial.npz"
    np.savez_compressed(partial, **arrays)
    (out / "corpus.json").write_text(
        json.dumps(
            _meta(name or about["name"], about["told"], tokenizers, names, rows, documents),
            indent=1,
            ensure_ascii=False,
        )
        + "\n",
        encoding="utf-8",
    )
    if (folder / "LICENSES.md").is_file():
        shutil.copyfile(folder / "LICENSES.md", out / "LICENSES.md")
    if (folder / "LICENSES.md").is_file() and about["permissive"]:
        notices = files("omnimoe.data").joinpath("NOTICES.md").read_text(encoding="utf-8")
        (out / "ATTRIBUTION").write_text(_attribution(notices), encoding="utf-8")
    partial.rename(out / "tokens.npz")
    return out


def _about(folder: Path) -> dict[str, Any]:
    """What ``build_corpus`` says of a folder; a folder without it is taken for set P."""
    file = folder / "about.json"
    said = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    return {"name": "p", "permissive": True, "told": "en", "shares_concepts": False, "own_splits": False, **said}


def encode_all(tokenizer: Tokenizer, raws: list[Any], what: str, batch: int = 64) -> list[np.ndarray]:
    """Ids of each, with a bar called by ``what`` they are."""
    if not hasattr(tokenizer, "encode_batch"):
        return [np.asarray(tokenizer.encode(raw)) for raw in tqdm(raws, desc=f"tokens of {what}", disable=None)]
    encoded: list[np.ndarray] = []
    for start in tqdm(range(0, len(raws), batch), desc=f"tokens of {what}", disable=None):
        encoded.extend(np.asarray(ids, dtype=np.int64) for ids in tokenizer.encode_batch(raws[start : start + batch]))
    return encoded


def _meta(
    name: str,
    told: str,
    tokenizers: Mapping[str, Tokenizer],
    names: dict[str, list[str]],
    rows: list[dict],
    documents: list[dict],
) -> dict[str, Any]:
    contents = "\n".join(f"{row['lang']}\t{row['text']}\t{row['split']}" for row in rows)
    return {
        "format": FORMAT,
        "name": name,
        "told": told,
        "languages": names["languages"],
        "sources": names["sources"],
        "styles": names["styles"],
        "topics": names["topics"],
        "vocab_sizes": {modality: int(tokenizer.vocab_size) for modality, tokenizer in tokenizers.items()},
        "num_tokens": {modality: tokenizer.num_tokens for modality, tokenizer in tokenizers.items()},
        "frame_sizes": {modality: tokenizer.frame_size for modality, tokenizer in tokenizers.items()},
        "grids": {modality: list(tokenizer.grid) for modality, tokenizer in tokenizers.items() if tokenizer.grid},
        "units_per_second": getattr(tokenizers["speech"], "units_per_second", None),
        "rows": len(rows),
        "documents": len(documents),
        "rows_sha256": hashlib.sha256(contents.encode()).hexdigest(),
    }


def _attribution(notices: str) -> str:
    """The credits alone, for whoever passes the tokens or weights trained on them on."""
    wanted = ("**Attribution", "**Apache", "**MIT", "**BSD", "**WordNet", "**Unicode")
    parts = [part.strip() for part in notices.split("\n\n") if part.startswith(wanted)]
    return (
        "Set P contains works of others, as tokens. Keep this file beside them; LICENSES.md lists every source.\n\n"
        + "\n\n".join(parts)
        + "\n"
    )


def _check(rows: list[dict[str, Any]], documents: list[dict[str, Any]], about: dict[str, Any]) -> None:
    try:
        check_leaks(rows, documents, shares_concepts=about["shares_concepts"])
    except LeakError as error:
        if not about["own_splits"]:
            raise
        # Splits that somebody set are theirs to answer for, but they should know.
        logger.warning("the splits that the data name overlap: %s", error)


def _tell_size(images: np.ndarray, tokenizer: Tokenizer) -> None:
    """Warns of pictures that the tokenizer reads at another size than the folder has them in."""
    side, drawn = images.shape[1], getattr(tokenizer, "image_size", None)
    if len(images) and drawn not in (None, side):
        logger.warning(
            "the pictures have %d x %d pixels, and the tokenizer %r reads and draws %d x %d, so they are scaled; for "
            "another one: --tokenizer image=NAME:PATH, or tokenizers={'image': ...}",
            *(side, side, tokenizer.registered_name, drawn, drawn),
        )


def _used(rows: list[dict[str, Any]], parts: list[tuple[str, Any]], key: str) -> tuple[list[int], dict[int, int]]:
    used = sorted({row[key] for row in rows if row[key] >= 0} | {value for kind, value in parts if kind == key})
    return used, {old: new for new, old in enumerate(used)}


def _names(rows: list[dict[str, Any]], key: str) -> list[str]:
    return sorted({row[key] for row in rows})


def _column(values: Any) -> np.ndarray:
    return np.fromiter(values, dtype=np.int32)


def _codes(codes: list[np.ndarray], tokenizer: Tokenizer) -> np.ndarray:
    return np.stack(codes).astype(np.uint16) if codes else np.zeros((0, tokenizer.num_tokens or 0), np.uint16)


def ragged(name: str, items: list[np.ndarray]) -> dict[str, np.ndarray]:
    """Sequences as the arrays of a file of tokens.

    Raises:
        CorpusError: if an id does not fit.
    """
    values = np.concatenate(items) if items else np.zeros(0, np.int64)
    if values.size and int(values.max()) > np.iinfo(np.uint16).max:
        raise CorpusError(f"{name} has id {int(values.max())}; ids above 65535 do not fit the file format")
    return {
        f"{name}_values": values.astype(np.uint16),
        f"{name}_lengths": np.array([len(item) for item in items], np.int32),
    }


def _lines(path: Path) -> list[dict[str, Any]]:
    with path.open(encoding="utf-8") as file:
        return [json.loads(line) for line in file]

"""Rows to documents: which field holds what, in JSON lines, shards and tables alike."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from PIL import Image

from omnimoe.data.readers.base import Document, DocumentError, RawFile, check_characters

COLUMNS: dict[str, tuple[str, ...]] = {
    "text": ("text", "caption", "transcription", "transcript", "sentence"),
    "image": ("image", "image_file_name", "picture"),
    "speech": ("speech", "audio", "audio_file_name"),
    "video": ("video", "video_file_name"),
}
"""Modality to the names that its field may have; the first one present counts."""

ENDINGS: dict[str, tuple[str, ...]] = {
    "text": ("txt", "caption"),
    "image": ("png", "jpg", "jpeg", "webp", "gif", "bmp", "tif", "tiff", "ppm"),
    "speech": ("wav", "flac", "ogg", "opus", "mp3", "aiff"),
    "video": ("mp4", "m4v", "mov", "webm", "mkv", "avi"),
}
"""Modality to the file name endings that stand for it."""

FILE_NAME, SPANS = "file_name", ("spans", "document", "interleaved")
SPLIT_NAMES = {"train": "train", "val": "val", "valid": "val", "validation": "val", "dev": "val", "test": "test"}
_KEPT = {"split": "split", "lang": "lang", "language": "lang", "key": "key", "topic": "topic"}
_BY_ENDING = {ending: modality for modality, endings in ENDINGS.items() for ending in endings}


def modality_of(name: str) -> str | None:
    """The modality that the ending of a file name stands for, or None."""
    return _BY_ENDING.get(name.rpartition(".")[2].lower())


def to_document(
    fields: Mapping[str, Any], where: str, find: Callable[[str], RawFile], columns: Mapping[str, str] | None = None
) -> Document:
    """A row to a document.

    Args:
        fields: a row: ``text``, ``image``, ``audio`` and ``video`` or other names of :data:`COLUMNS` in any
            combination, values single or in lists; or ``file_name``, whose ending says what it is; or ``spans``, a list
            of strings (text) and of objects with one field such as ``{"image": "a.png"}``. Beside these ``split``,
            ``lang``, ``key`` and ``topic``; all else is left alone.
        where: for messages.
        find: file name to the file.
        columns: modality to the name of its field, over :data:`COLUMNS`.

    Raises:
        DocumentError: if the row has nothing of use, or a value is of the wrong kind.
    """
    if not isinstance(fields, Mapping):
        raise DocumentError(f"{where}: a row is an object with fields, not {type(fields).__name__}")
    kept = {
        to: check_characters(str(fields[name]), name, where)
        for name, to in _KEPT.items()
        if isinstance(fields.get(name), str | int)
    }
    if "split" in kept:
        kept["split"] = _split(kept["split"], where)
    for name in SPANS:
        if isinstance(fields.get(name), list):
            spans = tuple(_span(part, where, find, columns) for part in fields[name])
            if not spans:
                raise DocumentError(f"{where}: {name} is an empty list")
            return Document(spans=spans, where=where, is_ordered=True, fields=kept)
    found = tuple(_columns(fields, where, find, columns))
    if not found:
        raise DocumentError(
            f"{where}: has no text, image, audio or video; its fields are {', '.join(map(str, fields)) or 'none'}; "
            "name them with columns, such as {'text': 'title'}"
        )
    # Several pictures or clips have an order that permuting whole modalities would not keep.
    several = len({modality for modality, _ in found}) < len(found)
    return Document(spans=found, where=where, is_ordered=several, fields=kept)


def _columns(fields: Mapping[str, Any], where: str, find: Callable, columns: Mapping[str, str] | None) -> Any:
    named = fields.get(FILE_NAME)
    for modality, usual in COLUMNS.items():
        chosen = (columns or {}).get(modality)
        if chosen is not None and chosen not in fields:
            raise DocumentError(f"{where}: has no field {chosen!r}; its fields are {', '.join(map(str, fields))}")
        name = chosen or next((name for name in usual if fields.get(name) is not None), None)
        if name is not None:
            values = fields[name]
            for value in values if isinstance(values, list) and modality != "speech" else [values]:
                yield modality, _value(modality, value, where, find)
        elif isinstance(named, str) and modality_of(named) == modality:
            yield modality, _value(modality, named, where, find)
    if isinstance(named, str) and modality_of(named) is None:
        raise DocumentError(f"{where}: {named} is neither a picture nor sound nor video by its ending")


def _span(part: Any, where: str, find: Callable, columns: Mapping[str, str] | None) -> tuple[str, Any]:
    if isinstance(part, str):
        return "text", part
    found = list(_columns(part, where, find, columns)) if isinstance(part, Mapping) else []
    if len(found) != 1:
        raise DocumentError(
            f"{where}: a span is a string or an object with one of text, image, audio and video, not {str(part)[:60]}"
        )
    return found[0]


def _value(modality: str, value: Any, where: str, find: Callable[[str], RawFile]) -> Any:
    if modality == "text":
        if not isinstance(value, str):
            raise DocumentError(f"{where}: text must be a string, not {type(value).__name__}")
        return value
    if isinstance(value, str):
        return find(check_characters(value, f"the file name of {modality}", where))
    if isinstance(value, bytes):
        return RawFile(name=f"the {modality}", data=value)
    if isinstance(value, Mapping):
        if value.get("bytes") is not None:
            return RawFile(name=str(value.get("path") or f"the {modality}"), data=value["bytes"])
        if value.get("path"):
            return find(str(value["path"]))
        if modality == "speech" and {"array", "sampling_rate"} <= set(value):
            return np.asarray(value["array"], np.float32), int(value["sampling_rate"])
    if modality == "image" and isinstance(value, Image.Image | np.ndarray):
        return value
    raise DocumentError(f"{where}: {modality} must be a file name or bytes, not {type(value).__name__}")


def _split(name: str, where: str) -> str:
    if name.lower() not in SPLIT_NAMES:
        raise DocumentError(f"{where}: has split {name!r}; known are {', '.join(SPLIT_NAMES)}")
    return SPLIT_NAMES[name.lower()]

"""Many prompts in a file: a caption a line, or a JSON document a line."""

from __future__ import annotations

import json
from os import PathLike
from pathlib import Path
from typing import Any

from omnimoe.generation.media import GenerationError, read_wave

SOUND_ENDINGS = (".wav",)


def read_raw(modality: str, given: str, folder: Path | None = None) -> Any:
    """An input as it is written on a command line or in a file: words, or the path of a picture or sound.

    Args:
        modality: its modality.
        given: text, or a path where the modality is not text.
        folder: what paths are relative to; the working directory where None.
    """
    if modality == "text":
        return given
    path = given if folder is None else str(folder / given)
    return read_wave(path) if path.lower().endswith(SOUND_ENDINGS) or modality == "speech" else path


def read_prompts(path: str | PathLike[str]) -> list[list[tuple[str, Any]]]:
    """Documents of a file.

    Args:
        path: of a text file with a caption a line, or a ``.jsonl`` with an object ``{"text": "a lion", "image":
            "lion.png"}`` or a list of pairs ``[["image", "lion.png"], ["text", "a"]]`` a line, paths relative to the
            file. Empty lines are passed over.

    Raises:
        GenerationError: if there is no such file, it holds no prompt, or a line is no document.
    """
    path = Path(path)
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        raise GenerationError(f"no file of prompts at {path}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise GenerationError(f"{path} is no text file in UTF-8: {error}") from None
    numbered = [(number, line.strip()) for number, line in enumerate(lines, 1) if line.strip()]
    if not numbered:
        raise GenerationError(f"{path} holds no prompt; write one a line")
    if path.suffix.lower() != ".jsonl":
        return [[("text", line)] for _, line in numbered]
    return [_document(line, f"{path}:{number}", path.parent) for number, line in numbered]


def _document(line: str, where: str, folder: Path) -> list[tuple[str, Any]]:
    try:
        held = json.loads(line)
    except json.JSONDecodeError as error:
        raise GenerationError(f"{where} is no JSON: {error}") from None
    pairs = list(held.items()) if isinstance(held, dict) else held
    is_list = isinstance(pairs, list)
    if not is_list or any(
        not isinstance(pair, list | tuple) or len(pair) != 2 or not all(isinstance(part, str) for part in pair)
        for pair in pairs
    ):
        form = '{"text": "a lion"} or [["image", "lion.png"], ["text", "a"]]'
        raise GenerationError(f"{where} is no document: {line[:60]!r}; write {form}")
    try:
        return [(modality, read_raw(modality, given, folder)) for modality, given in pairs]
    except GenerationError as error:
        raise GenerationError(f"{where}: {error}") from None

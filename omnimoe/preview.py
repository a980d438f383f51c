"""What a corpus looks and sounds like: a contact sheet, clips to play, and a page with both.

Where the folder holds pictures and clips themselves, what the tokenizers make of them stands beside each; of a token
corpus, such as the shipped one, only that can be shown.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from omnimoe.data import Corpus, CorpusError, shipped_corpora
from omnimoe.data.own import cached_corpus
from omnimoe.data.speech import SAMPLE_RATE
from omnimoe.data.splits import SPLITS
from omnimoe.data.tokenize import TOKENIZERS
from omnimoe.generation.media import Generated
from omnimoe.generation.sheet import draw_sheet
from omnimoe.report import Report
from omnimoe.tokenizers.base import Tokenizer, load_tokenizer


@dataclass(frozen=True, kw_only=True)
class _Shown:
    """One row: pictures ``(H, W, 3)`` uint8 and clips ``(n,)`` float32, each the original, if it is there, then what
    comes back from tokens; and how many tokens each span has."""

    text: str
    lang: str
    source: str
    pictures: tuple[np.ndarray, ...] = ()
    clips: tuple[np.ndarray, ...] = ()
    lengths: tuple[int, ...] = ()


def preview_corpus(
    source: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    split: str = "train",
    count: int = 24,
    seed: int = 0,
    tokenizers: Mapping[str, Tokenizer] | None = None,
) -> Path:
    """Writes ``index.html``, ``sheet.png`` and ``clips/*.wav``.

    Args:
        source: a shipped corpus by name, a folder of tokens, a built folder, or data of one's own.
        out: folder to write, made if need be.
        split: rows of this split.
        count: rows to show, each of another concept; those with most modalities first.
        seed: of the choice.
        tokenizers: modality to tokenizer; those missing are the shipped ones.

    Returns:
        The page.

    Raises:
        CorpusError: if there is no such corpus, or the split has no rows.
    """
    if split not in SPLITS:
        raise CorpusError(f"unknown split {split!r}; known are {', '.join(SPLITS)}")
    if count < 1:
        raise CorpusError(f"count must be at least 1, got {count}")
    loaded = {name: (tokenizers or {}).get(name) or load_tokenizer(known) for name, known in TOKENIZERS.items()}
    folder = Path(source).expanduser()
    shipped = str(source).lower() in shipped_corpora()
    if not shipped and folder.exists() and not any((folder / f).exists() for f in ("rows.jsonl", "tokens.npz")):
        folder = cached_corpus(str(source))
    if not shipped and (folder / "rows.jsonl").is_file():
        shown = _raw_rows(folder, split, count, seed, loaded)
    else:
        shown = _token_rows(Corpus.load(source), split, count, seed, loaded)
    if not shown:
        raise CorpusError(f"split {split!r} of {source} has no rows to show; choose another split")
    return _written(shown, Path(out).expanduser(), f"{Path(source).name}, {split}")


def _raw_rows(folder: Path, split: str, count: int, seed: int, tokenizers: Mapping[str, Tokenizer]) -> list[_Shown]:
    with (folder / "rows.jsonl").open(encoding="utf-8") as file:
        rows = [row for row in map(json.loads, file) if row["split"] == split]
    images = np.load(folder / "images.npy", mmap_mode="r")
    audio, offsets = np.load(folder / "audio.npy", mmap_mode="r"), np.load(folder / "audio_offsets.npy")
    full = np.array([(row["image"] >= 0) + (row["audio"] >= 0) for row in rows])
    shown = []
    for row in (rows[i] for i in _choice(full, [row["key"] for row in rows], count, seed)):
        picture = [np.array(images[row["image"]])] if row["image"] >= 0 else []
        ends = offsets[row["audio"] : row["audio"] + 2] if row["audio"] >= 0 else ()
        clip = [np.array(audio[slice(*ends)], np.float32) / 32768] if len(ends) else []
        codes = [tokenizers["image"].encode(raw) for raw in picture]
        units = [tokenizers["speech"].encode(raw, SAMPLE_RATE) for raw in clip]  # type: ignore[call-arg]
        words = tokenizers["text"].encode(row["text"])
        shown.append(
            _Shown(
                text=row["text"],
                lang=row["lang"],
                source=row["source"],
                pictures=(*picture, *(tokenizers["image"].decode(ids) for ids in codes)),
                clips=(*clip, *(tokenizers["speech"].decode(ids) for ids in units)),
                lengths=(len(words), *map(len, (*codes, *units))),
            )
        )
    return shown


def _token_rows(corpus: Corpus, split: str, count: int, seed: int, tokenizers: Mapping[str, Tokenizer]) -> list[_Shown]:
    rows = corpus.select(split, languages=None)
    full = (corpus.rows["image"][rows] >= 0).astype(int) + (corpus.rows["audio"][rows] >= 0)
    shown = []
    for row in (corpus[int(rows[i])] for i in _choice(full, corpus.rows["group"][rows].tolist(), count, seed)):
        spans = [ids for ids in (row.text, row.image, row.speech) if ids is not None]
        shown.append(
            _Shown(
                text=tokenizers["text"].decode(row.text),
                lang=row.lang,
                source=row.source,
                pictures=() if row.image is None else (tokenizers["image"].decode(row.image),),
                clips=() if row.speech is None else (tokenizers["speech"].decode(row.speech),),
                lengths=tuple(map(len, spans)),
            )
        )
    return shown


def _choice(full: np.ndarray, concepts: list[Any], count: int, seed: int) -> list[int]:
    """Places of rows, one a concept, those with most modalities first, else at random."""
    order = np.random.default_rng(seed).permutation(len(full)).tolist()
    order.sort(key=lambda place: -full[place])
    chosen: dict[Any, int] = {}
    for place in order:
        chosen.setdefault(concepts[place], place)
    return list(chosen.values())[:count]


def _written(shown: list[_Shown], out: Path, title: str) -> Path:
    out.mkdir(parents=True, exist_ok=True)
    report = Report(title)
    pictured = [row for row in shown if row.pictures]
    both = any(len(row.pictures) == 2 for row in pictured)
    if pictured:
        side = max(picture.shape[0] for row in pictured for picture in row.pictures)
        groups = [[_enlarged(picture, side) for picture in row.pictures] for row in pictured]
        sheet = draw_sheet(groups, [row.text for row in pictured], out / "sheet.png", scale=2 if side <= 64 else 1)
        report.heading("Pictures")
        report.text("Left the original, right what comes back from its tokens." if both else "Decoded from tokens.")
        report.picture(sheet, "pictures with captions")
    spoken = [row for row in shown if row.clips]
    if spoken:
        report.heading("Speech")
        (out / "clips").mkdir(exist_ok=True)
        for number, row in enumerate(spoken):
            names = ("", " (from tokens)") if len(row.clips) == 2 else (" (from tokens)",)
            for name, clip in zip(names, row.clips, strict=True):
                made = Generated(modality="speech", raw=clip, sample_rate=SAMPLE_RATE)
                path = made.save(out / "clips" / f"{number:03}{'-decoded' if name else ''}.wav")
                report.sound(path, f"{row.text} [{row.lang}]{name}")
    report.heading("Rows")
    rows = [[row.text, row.lang, row.source, " + ".join(map(str, row.lengths))] for row in shown]
    report.table(["text", "language", "source", "tokens of text + picture + clip"], rows)
    return report.write(out / "index.html")


def _enlarged(picture: np.ndarray, side: int) -> np.ndarray:
    if picture.shape[0] == side:
        return picture
    return np.asarray(Image.fromarray(picture).resize((side, side), Image.Resampling.NEAREST))

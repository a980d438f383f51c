"""What a corpus looks and sounds like: a contact sheet, clips to play, documents span by span, and a page with all.

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
from omnimoe.generation.pages import add_spans, write_spans
from omnimoe.generation.sheet import draw_sheet
from omnimoe.report import Report
from omnimoe.tokenizers.base import Tokenizer, load_tokenizer

LONGEST_TEXT = 600
"""Characters of a text of a document that are shown."""


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


@dataclass(frozen=True, kw_only=True)
class _Raw:
    """Pictures ``(n, H, W, 3)`` uint8 and clips, end to end ``(samples,)`` int16, of a built folder."""

    images: np.ndarray
    audio: np.ndarray
    offsets: np.ndarray

    @classmethod
    def open(cls, folder: Path) -> _Raw:
        images, audio = (np.load(folder / name, mmap_mode="r") for name in ("images.npy", "audio.npy"))
        return cls(images=images, audio=audio, offsets=np.load(folder / "audio_offsets.npy"))

    def picture(self, index: int) -> np.ndarray:
        return np.array(self.images[index])

    def clip(self, index: int) -> np.ndarray:
        return np.array(self.audio[slice(*self.offsets[index : index + 2])], np.float32) / 32768


def preview_corpus(
    source: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    split: str = "train",
    count: int = 24,
    seed: int = 0,
    tokenizers: Mapping[str, Tokenizer] | None = None,
) -> Path:
    """Writes ``index.html``, ``sheet.png``, ``clips/*.wav``, and of documents ``documents/*``, a file a span.

    Args:
        source: a shipped corpus by name, a folder of tokens, a built folder, or data of one's own.
        out: folder to write, made if need be.
        split: rows and documents of this split.
        count: most rows to show, each of another concept, those with most modalities first; and most documents,
            interleaved ones before running text.
        seed: of the choice.
        tokenizers: modality to tokenizer; those missing are the shipped ones.

    Returns:
        The page.

    Raises:
        CorpusError: if there is no such corpus, or the split has no rows and no documents.
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
        rows, documents, filled = _raw(folder, split, count, seed, loaded)
    else:
        rows, documents, filled = _tokens(Corpus.load(source), split, count, seed, loaded)
    if not rows and not documents:
        others = f"choose {' or '.join(filled)}" if filled else "no other split has any"
        raise CorpusError(f"split {split!r} of {source} has no rows to show; {others}")
    return _written(rows, documents, Path(out).expanduser(), f"{Path(source).name}, {split}")


def _raw(
    folder: Path, split: str, count: int, seed: int, tokenizers: Mapping[str, Tokenizer]
) -> tuple[list[_Shown], list[list[Generated]], list[str]]:
    """Rows and documents of a built folder, and the splits that have any."""
    raw = _Raw.open(folder)
    rows, *others = (_lines(folder / f"{name}.jsonl") for name in ("rows", "interleaved", "text"))
    filled = {line["split"] for lines in (rows, *others) for line in lines}
    shown = _raw_rows([row for row in rows if row["split"] == split], raw, count, seed, tokenizers)
    held = [[line for line in lines if line["split"] == split] for lines in others]
    documents = [held[kind][place] for kind, place in _first(list(map(len, held)), count, seed)]
    told = [_raw_spans(line.get("spans") or [{"text": line["text"]}], raw, tokenizers) for line in documents]
    return shown, told, [name for name in SPLITS if name in filled]


def _lines(path: Path) -> list[dict[str, Any]]:
    if not path.is_file():
        return []
    with path.open(encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def _raw_spans(spans: list[dict[str, Any]], raw: _Raw, tokenizers: Mapping[str, Tokenizer]) -> list[Generated]:
    """The spans of a document in order, behind each picture and clip what comes back from its tokens."""
    made = []
    for kind, value in (pair for span in spans for pair in span.items()):
        if kind == "text":
            made.append(_words(value))
        elif kind == "image":
            picture = raw.picture(value)
            back = tokenizers["image"].decode(tokenizers["image"].encode(picture))
            made += [_picture(picture), _picture(back, "image-decoded")]
        else:
            clip = raw.clip(value)
            units = tokenizers["speech"].encode(clip, SAMPLE_RATE)  # type: ignore[call-arg]
            made += [_sound(clip), _sound(tokenizers["speech"].decode(units), "speech-decoded")]
    return made


def _words(text: str) -> Generated:
    return Generated(modality="text", raw=text if len(text) <= LONGEST_TEXT else f"{text[:LONGEST_TEXT]}…")


def _picture(raw: np.ndarray, name: str = "image") -> Generated:
    return Generated(modality=name, raw=raw)


def _sound(clip: np.ndarray, name: str = "speech") -> Generated:
    return Generated(modality=name, raw=clip, sample_rate=SAMPLE_RATE)


def _raw_rows(
    rows: list[dict[str, Any]], raw: _Raw, count: int, seed: int, tokenizers: Mapping[str, Tokenizer]
) -> list[_Shown]:
    full = np.array([(row["image"] >= 0) + (row["audio"] >= 0) for row in rows])
    shown = []
    for row in (rows[i] for i in _choice(full, [row["key"] for row in rows], count, seed)):
        picture = [raw.picture(row["image"])] if row["image"] >= 0 else []
        clip = [raw.clip(row["audio"])] if row["audio"] >= 0 else []
        codes = [tokenizers["image"].encode(held) for held in picture]
        units = [tokenizers["speech"].encode(held, SAMPLE_RATE) for held in clip]  # type: ignore[call-arg]
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


def _tokens(
    corpus: Corpus, split: str, count: int, seed: int, tokenizers: Mapping[str, Tokenizer]
) -> tuple[list[_Shown], list[list[Generated]], list[str]]:
    """Rows and documents of a corpus of tokens, and the splits that have any."""
    number, stories = SPLITS.index(split), corpus.interleaved
    order = np.zeros(0, np.int64) if stories is None else stories.splits
    filled = {*corpus.rows["split"].tolist(), *corpus.documents["split"].tolist(), *order.tolist()}
    held = [np.flatnonzero(order == number), corpus.select_documents(split)]
    documents = []
    for kind, place in _first(list(map(len, held)), count, seed):
        index = int(held[kind][place])
        text = ("text", corpus.texts[int(corpus.documents["text"][index])])
        documents.append(_token_spans(corpus.interleaved_spans(index) if kind == 0 else [text], tokenizers))
    return _token_rows(corpus, split, count, seed, tokenizers), documents, [SPLITS[i] for i in sorted(filled)]


def _token_spans(spans: list[tuple[str, np.ndarray]], tokenizers: Mapping[str, Tokenizer]) -> list[Generated]:
    made = []
    for name, ids in spans:
        raw = tokenizers[name].decode(ids)
        made.append(_words(raw) if name == "text" else _sound(raw) if name == "speech" else _picture(raw))
    return made


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


def _first(sizes: list[int], count: int, seed: int) -> list[tuple[int, int]]:
    """Kind and place of ``count`` documents at random, those of an earlier kind first."""
    generator = np.random.default_rng(seed)
    return [(kind, place) for kind, size in enumerate(sizes) for place in generator.permutation(size).tolist()][:count]


def _written(shown: list[_Shown], documents: list[list[Generated]], out: Path, title: str) -> Path:
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
                path = _sound(clip).save(out / "clips" / f"{number:03}{'-decoded' if name else ''}.wav")
                report.sound(path, f"{row.text} [{row.lang}]{name}")
    if shown:
        report.heading("Rows")
        rows = [[row.text, row.lang, row.source, " + ".join(map(str, row.lengths))] for row in shown]
        report.table(["text", "language", "source", "tokens of text + picture + clip"], rows)
    for number, spans in enumerate(documents, 1):
        report.heading(f"Document {number}")
        add_spans(report, spans, write_spans(spans, out / "documents", f"{number:03}"))
    return report.write(out / "index.html")


def _enlarged(picture: np.ndarray, side: int) -> np.ndarray:
    if picture.shape[0] == side:
        return picture
    return np.asarray(Image.fromarray(picture).resize((side, side), Image.Resampling.NEAREST))

"""Builds set P: pictures, English speech and text from permissively licensed packages, in one command.

Every emoji is one concept drawn in several styles and named in many languages; Open Clip Art adds titled drawings,
scikit-learn handwritten digits. Each distinct English caption is spoken once. Running text comes from the King James
Bible, WordNet and the Jargon File. Packages, pictures and clips stay in the cache, so an interrupted build goes on
where it stopped, and a second one takes seconds.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Callable
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np

from omnimoe.data import emoji, openclipart, speech, texts
from omnimoe.data.pictures import IMAGE_SIZES, SIDE, fingerprint, scaled
from omnimoe.data.sources import Source
from omnimoe.data.splits import assign_splits, check_leaks, concept_key, digest_split, drop_defined, loose_key
from omnimoe.tokenizers.text import BpeTokenizer

logger = logging.getLogger(__name__)

MAX_KJV, MAX_WORDNET, MAX_JARGON = 1_200_000, 2_400_000, 700_000
_MERGED_LANGUAGES = frozenset({"en", "de", "es", "fr", "it", "nl", "pt"})
SOURCES: tuple[Source, ...] = (
    *emoji.STYLES,
    emoji.LABELS,
    openclipart.OPENCLIPART,
    texts.DIGITS,
    texts.KJV,
    texts.WORDNET,
    texts.JARGON,
)


class _Store:
    """Pictures, clips and rows as they are collected; pictures that are equal at 64 pixels are kept once.

    Whatever the size, equality and likeness are judged at 64 pixels, so that rows and splits are the same for each.
    """

    def __init__(self, side: int) -> None:
        self.side = side
        self.pictures: list[np.ndarray] = []
        self.fingerprints: list[bytes] = []
        self.rows: list[dict[str, Any]] = []
        self._picture_index: dict[bytes, int] = {}

    def picture(self, pixels: np.ndarray) -> int:
        small = scaled(pixels, SIDE)
        digest = hashlib.sha1(small.tobytes()).digest()
        if digest not in self._picture_index:
            self._picture_index[digest] = len(self.pictures)
            self.pictures.append(pixels)
            self.fingerprints.append(fingerprint(small))
        return self._picture_index[digest]

    def row(
        self, source: str, text: str, lang: str, image: int, key: str, style: str, license: str, **extra: Any
    ) -> None:
        self.rows.append(
            {
                "source": source,
                "text": text,
                "lang": lang,
                "image": image,
                "audio": -1,
                "key": key,
                "style": style,
                "license": license,
                **extra,
            }
        )


def build_corpus(
    name: str = "P",
    *,
    out: str | os.PathLike[str],
    cache: str | os.PathLike[str] | None = None,
    image_size: int = SIDE,
) -> Path:
    """Builds a corpus into a folder that appears only when it is complete.

    Files: ``images.npy (N, image_size, image_size, 3)`` uint8; ``audio.npy (samples,)`` int16, 16 kHz, all clips end to
    end; ``audio_offsets.npy (clips + 1,)`` int64; ``rows.jsonl``, one object a row with ``source, text, lang, image,
    audio, key, group, split, style, license`` (``image`` and ``audio`` are indices or -1); ``text.jsonl``, running
    text; ``LICENSES.md``.

    Args:
        name: ``"P"``, the permissive set; the only one so far.
        out: folder to make; it must not exist, or be empty.
        cache: where packages and intermediate results stay; default ``$OMNIMOE_CACHE`` or ``~/.cache/omnimoe``.
        image_size: height and width of the pictures, 64 or 128. Rows, indices and splits are the same for both.

    Returns:
        The folder.

    Raises:
        ValueError: if the name or the size is unknown or the folder holds something.
        SourceError: if a package cannot be fetched; the message names it and the remedy.
        LeakError: if the splits overlap, which would be a bug.
    """
    if name.upper() not in _SETS:
        raise ValueError(f"unknown corpus {name!r}; known: {', '.join(_SETS)}")
    if image_size not in IMAGE_SIZES:
        raise ValueError(f"image_size must be {' or '.join(map(str, IMAGE_SIZES))}, got {image_size!r}")
    out = Path(out).expanduser()
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out} exists and is not an empty folder; choose another one or remove it first")
    out.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(dir=out.parent, prefix=f".{out.name}-"))
    try:
        _SETS[name.upper()](work, cache, image_size)
        work.chmod(0o755)
        if out.is_dir():
            out.rmdir()
        work.rename(out)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return out


def _build_p(work: Path, cache: str | os.PathLike[str] | None, side: int) -> None:
    store = _Store(side)
    drawn = emoji.read_emoji(cache)
    _add_emoji(store, drawn, cache)
    for drawing in openclipart.read_openclipart(texts.wordnet_words(cache), cache, side):
        index = store.picture(drawing.pixels)
        store.row(
            "openclipart",
            drawing.title,
            "en",
            index,
            concept_key(drawing.title),
            "openclipart",
            openclipart.OPENCLIPART.license,
        )
    pictures, digits = texts.read_digits(cache, side)
    for pixels, digit in zip(pictures, digits, strict=True):
        word = texts.DIGIT_WORDS[digit]
        store.row("digits", word, "en", store.picture(pixels), word, "handwritten", texts.DIGITS.license)

    _add_words(store, cache)
    clips = _add_speech(store, cache)
    assign_splits(store.rows, look_alikes=store.fingerprints, always_train=texts.DIGIT_WORDS)
    collected = _running_text(store, cache)
    documents = drop_defined(collected, store.rows)
    logger.info("entries of train left out, as they define held-out concepts: %d", len(collected) - len(documents))
    logger.info("rows by split: %s", check_leaks(store.rows, documents))

    np.save(work / "images.npy", np.stack(store.pictures).reshape(-1, side, side, 3))
    np.save(work / "audio.npy", np.concatenate(clips))
    np.save(work / "audio_offsets.npy", np.cumsum([0, *map(len, clips)], dtype=np.int64))
    _write_lines(work / "rows.jsonl", store.rows)
    _write_lines(work / "text.jsonl", documents)
    (work / "LICENSES.md").write_text(license_page(side), encoding="utf-8")


_SETS: dict[str, Callable[[Path, str | os.PathLike[str] | None, int], None]] = {"P": _build_p}


def _add_emoji(store: _Store, drawn: list[emoji.Emoji], cache: str | os.PathLike[str] | None) -> None:
    pictures: dict[str, list[tuple[int, Source]]] = {}
    for style in emoji.STYLES:
        for code, variants in emoji.render_style(style, drawn, cache, store.side).items():
            pictures.setdefault(code, []).extend((store.picture(pixels), style) for pixels in variants)
    for one in drawn:
        key = concept_key(one.label)
        shown = pictures.get(one.code, [])
        for index, style in shown:
            extra = {"tags": list(one.tags)} if style is shown[0][1] else {}
            store.row("emoji", one.label, "en", index, key, style.name, style.license, **extra)
        for lang, label in sorted(one.labels.items()):
            if shown:
                # One picture a language, so that the languages do not outweigh English.
                index, style = shown[int(hashlib.sha1(f"{one.code} {lang}".encode()).hexdigest(), 16) % len(shown)]
                store.row("emoji", label, lang, index, key, style.name, style.license)


def _add_words(store: _Store, cache: str | os.PathLike[str] | None) -> None:
    """Frequent words that no caption names, to be spoken: captions alone are too few to learn how letters sound."""
    named = {loose_key(row["text"]) for row in store.rows if row["lang"] == "en"}
    for word in texts.frequent_words(cache):
        # A word that is loosely a caption would pull its held-out concept into train.
        if loose_key(word) not in named:
            store.row("words", word, "en", -1, concept_key(word), "", texts.WORDNET.license)


def _add_speech(store: _Store, cache: str | os.PathLike[str] | None) -> list[np.ndarray]:
    captions = sorted({row["text"] for row in store.rows if row["lang"] == "en"})
    clips: list[np.ndarray] = []
    index: dict[str, int] = {}
    by_sound: dict[bytes, int] = {}
    for caption, clip in zip(captions, speech.speak(captions, cache), strict=True):
        if not speech.MIN_SAMPLES <= len(clip) <= speech.MAX_SAMPLES:
            continue
        digest = hashlib.sha1(clip.tobytes()).digest()
        if digest not in by_sound:
            by_sound[digest] = len(clips)
            clips.append(clip)
        index[caption] = by_sound[digest]
    for row in store.rows:
        if row["lang"] == "en":
            row["audio"] = index.get(row["text"], -1)
    return clips


def _running_text(store: _Store, cache: str | os.PathLike[str] | None) -> list[dict[str, Any]]:
    documents = []
    for source, found in (
        (texts.KJV, texts.bounded(texts.read_kjv(cache), MAX_KJV)),
        (texts.WORDNET, texts.bounded(texts.read_wordnet(cache), MAX_WORDNET)),
        (texts.JARGON, texts.bounded(texts.read_jargon(cache), MAX_JARGON)),
    ):
        for name, text in found:
            key = f"{source.name} {name}"
            documents.append(
                {
                    "source": source.name,
                    "key": key,
                    "text": text,
                    "lang": "en",
                    "split": digest_split(key),
                    "license": source.license,
                    "heads": texts.headwords(source, name, text),
                }
            )
    # Keywords name the concept, so they follow its split.
    done = set()
    for row in store.rows:
        if row.get("tags") and row["text"] not in done and row["split"] != "drawing":
            done.add(row["text"])
            documents.append(
                {
                    "source": "emojibase",
                    "key": row["key"],
                    "text": f"{row['text']}: {', '.join(row['tags'])}",
                    "lang": "en",
                    "split": row["split"],
                    "license": emoji.LABELS.license,
                    "heads": [row["text"]],
                }
            )
    return documents


def license_page(side: int = SIDE) -> str:
    """What the corpus is made of, under which licences and by whom, in Markdown."""
    lines = [
        "# Sources and licences of set P",
        "",
        "Every source allows use, change and distribution, some with credit. Pictures were rendered to "
        f"{side} x {side} pixels on white; "
        "that is the only change. Set names in `rows.jsonl` are those of the first column.",
        "",
        "| source | what is used | licence | credit | package |",
        "|---|---|---|---|---|",
    ]
    for source in SOURCES:
        package = f"{source.kind} {source.package} {source.version}"
        lines.append(
            f"| {source.name} | {source.used} | {source.license} | [{source.credit}]({source.homepage}) | {package} |"
        )
    lines.append(
        f"| speech | speech of the captions | {speech.HIBARI_LICENSE} | {speech.HIBARI_CREDIT} | wheel hibari-tts |"
    )
    return "\n".join(lines) + "\n\n" + files("omnimoe.data").joinpath("NOTICES.md").read_text(encoding="utf-8")


def train_text_tokenizer(folder: str | os.PathLike[str], *, vocab_size: int = 2048) -> BpeTokenizer:
    """Learns the byte pairs of the text tokenizer from the training split of a built folder.

    English captions count eight times and those of six related languages once, running text in full; val, test and
    drawing are not looked at. Other languages are left to bytes: 26 of them would take half of a small vocabulary.
    """
    folder = Path(folder)
    captions, running = set(), []
    for line in (folder / "rows.jsonl").open(encoding="utf-8"):
        row = json.loads(line)
        if row["split"] == "train" and row["lang"] in _MERGED_LANGUAGES:
            captions.add((row["lang"], row["text"]))
    for line in (folder / "text.jsonl").open(encoding="utf-8"):
        document = json.loads(line)
        if document["split"] == "train":
            running.append(document["text"])
    weighted = [text for lang, text in sorted(captions) for _ in range(8 if lang == "en" else 1)]
    return BpeTokenizer.train(weighted + running, vocab_size=vocab_size)


def _write_lines(path: Path, rows: list[dict[str, Any]]) -> None:
    with path.open("w", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")

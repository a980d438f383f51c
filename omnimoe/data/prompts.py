"""Asterisk's telephone prompts: one professional voice a language, with transcripts. 16 kHz, as G.722."""

from __future__ import annotations

import gzip
import logging
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from omnimoe.data.pictures import strip_text
from omnimoe.data.sources import Source, SourceError, fetch
from omnimoe.data.speech import SAMPLE_RATE, to_clip

logger = logging.getLogger(__name__)

_VERSION = "1.6.1-1"
_DIGESTS = {
    "en": (
        "973e797d28e37fa6ca3c0a9d6fa717e77cf1268ae916bf09fd3503113cdffa50",
        "38c5261820b406dcb0ecb37675720da2b0864850690690352ca52707eb623806",
    ),
    "es": (
        "9afdab7f559f036649fb406e625899306ca1004df8ebe39c30bfbd5912d66f74",
        "e4e3b4281057d3b81b779298fd6be705f57411513955c518eed1bcaabbd615b8",
    ),
    "fr": (
        "04c82c78c570c43a7136cbc5e2488d0c470b775468dff9fbce4a131b18cf1056",
        "7add61d5e42279ecff1bbdf842a5a946ac3644fac9a0fe44384731aa7270c8e0",
    ),
    "it": (
        "3884d9457e12f21caa018c18f0d587df5d53ebea14b673d8453a134c5941ab3b",
        "46b4cf7afc508a5fcfc051b7ea233251c0d195dd4ef83cc4b7facb4c6429b016",
    ),
    "ru": (
        "28a61616bb0cd3345a7ea532dec4df9f071e5d0fa9f8c1a563ea9669002f39ab",
        "673b4238a6b8269960f055d868c6a11083f7a0d00979167cb01554046b48ed9b",
    ),
}


def _sources(lang: str) -> tuple[Source, Source]:
    words, sound = _DIGESTS[lang]
    fields = {
        "kind": "deb",
        "version": _VERSION,
        "license": "CC-BY-3.0" if lang in ("it", "ru") else "CC-BY-SA-3.0",
        "credit": "Digium, Inc. and the voices of the Asterisk core sounds",
        "homepage": "https://www.asterisk.org",
    }
    package = f"asterisk-core-sounds-{lang}"
    return (
        Source(name=f"asterisk-{lang}-text", package=package, sha256=words, used="transcripts of prompts", **fields),  # type: ignore[arg-type]
        Source(name=f"asterisk-{lang}", package=f"{package}-g722", sha256=sound, used="human recordings", **fields),  # type: ignore[arg-type]
    )


PROMPTS: dict[str, tuple[Source, Source]] = {lang: _sources(lang) for lang in _DIGESTS}
"""Language to the sources of transcripts and of recordings."""


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """One prompt: ``name``, its file without the ending; ``text``, what is said; ``lang``; ``samples (n,)`` int16."""

    name: str
    text: str
    lang: str
    samples: np.ndarray


def read_prompts(lang: str, cache: str | os.PathLike[str] | None = None) -> Iterator[Prompt]:
    """The prompts of a language whose transcript says words, in the order of the list."""
    words, sound = (fetch(source, cache) for source in PROMPTS[lang])
    folder = _folder(sound / "usr/share/asterisk/sounds", lang)
    listed = words / f"usr/share/doc/asterisk-core-sounds-{lang}/core-sounds-{lang}.txt.gz"
    for name, text in tqdm(read_transcripts(listed), desc=f"prompts in {lang}", disable=None):
        path = folder / f"{name}.g722"
        if path.exists():
            yield Prompt(name=name, text=text, lang=lang, samples=to_clip(read_g722(path), SAMPLE_RATE))


def read_transcripts(path: Path) -> list[tuple[str, str]]:
    """Name and words of each prompt in a packed list; notes in brackets, which describe a sound, are left out."""
    found = []
    with gzip.open(path, "rt", encoding="utf-8", errors="replace") as file:
        for line in file:
            name, _, text = line.partition(":")
            if text.strip() and not line.startswith(";") and not re.match(r"\s*[\[<(]", text):
                found.append((name.strip(), strip_text(text)))
    return found


def read_g722(path: Path) -> np.ndarray:
    """A file of raw G.722 as ``(n,)`` float32 at 16 kHz.

    Raises:
        SourceError: if PyAV is not installed.
    """
    try:
        import av
    except ImportError:
        raise SourceError("av is not installed and G.722 is read with it: pip install 'omnimoe[data]'") from None
    with av.open(str(path), format="g722") as container:
        frames = [frame.to_ndarray().ravel() for frame in container.decode(audio=0)]
    samples = np.concatenate(frames) if frames else np.zeros(0, np.int16)
    return samples.astype(np.float32) / 32768


def _folder(root: Path, lang: str) -> Path:
    # Named after country, sex and voice: en_US_f_Allison.
    found = sorted(path for path in root.glob(f"{lang}_*") if path.is_dir() and not path.is_symlink())
    if not found:
        raise SourceError(f"{root} has no folder {lang}_*; the package is laid out otherwise than {_VERSION}")
    return found[0]

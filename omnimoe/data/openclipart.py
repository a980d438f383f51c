"""Open Clip Art: titled public-domain drawings. A file is used only if the licence it states itself is public domain.

Left out: series without a subject (stars, gradients, icon sets, playing cards), titles that are no English words, and
further copies of a title beyond a few.
"""

from __future__ import annotations

import collections
import logging
import os
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from omnimoe.data.pictures import SIDE, PictureError, picture_cache, render_svg, scaled, strip_text
from omnimoe.data.sources import Source, cache_folder, fetch

logger = logging.getLogger(__name__)

OPENCLIPART = Source(
    name="openclipart",
    kind="deb",
    package="openclipart-svg",
    version="1:0.18+dfsg-19",
    sha256="989712d90d57dfa3230049f553bb43b76c30ee4d4b8c5f6e106e33f7db5cbdc5",
    license="LicenseRef-public-domain",
    credit="Contributors of the Open Clip Art Library",
    homepage="https://openclipart.org",
    used="titled drawings",
)

MAX_PER_TITLE = 6
_MAX_BYTES = 400_000
_SERIES = re.compile(
    r"(^|/)(stars?|gradients?|icons?|flowchart|callouts|jigsaw|cards|dice|backgrounds|flags/signal)(/|$)|lemon|etiquette|flat_icon",
    re.I,
)
_JUNK = re.compile(
    r"gramastar|untitled|unnamed|test|clip ?art|open ?clip|collection|template|logo|icon|gradient"
    r"|pattern|\bsvg\b|theme|button|various|road signs|symbol signs|@|https?:",
    re.I,
)
_TITLE = re.compile(r"<cc:Work[^>]*>.*?<dc:title[^>]*>([^<]*)</dc:title>", re.S | re.I)
_LICENSE = re.compile(r"<(?:cc:)?license\s+rdf:(?:resource|about)=\"([^\"]*)\"", re.I)


@dataclass(frozen=True, kw_only=True)
class Drawing:
    """A titled drawing: ``title`` and ``pixels (side, side, 3)`` uint8."""

    title: str
    pixels: np.ndarray


def read_openclipart(
    words: frozenset[str], cache: str | os.PathLike[str] | None = None, side: int = SIDE
) -> list[Drawing]:
    """All drawings with a usable title, in path order.

    Args:
        words: English words in lower case; a title needs three in four of its words among them.
        cache: as in :func:`omnimoe.data.sources.cache_folder`.
        side: width and height of a picture in pixels.
    """
    version = OPENCLIPART.version.replace(":", "_")
    stored = cache_folder(cache) / picture_cache(f"openclipart-{version}-{len(words)}", side)
    if not stored.exists():
        root = fetch(OPENCLIPART, cache) / "usr/share/openclipart/svg"
        titles, pictures = [], []
        counts: collections.Counter[str] = collections.Counter()
        seen: set[bytes] = set()
        skipped: collections.Counter[str] = collections.Counter()
        files = sorted(p for p in root.rglob("*.svg") if p.is_file() and not p.is_symlink())
        for path in tqdm(files, desc="drawings of openclipart", disable=None):
            title = usable_title(path, root, words, skipped)
            if title is None or counts[title.lower()] >= MAX_PER_TITLE:
                continue
            try:
                pixels = render_svg(path.read_text(encoding="utf-8", errors="replace"), side)
            except PictureError:
                skipped["blank or unreadable"] += 1
                continue
            # Compared at one size, so that every size has the same pictures.
            small = scaled(pixels, SIDE).tobytes()
            if small in seen:
                skipped["duplicate"] += 1
                continue
            seen.add(small)
            counts[title.lower()] += 1
            titles.append(title)
            pictures.append(pixels)
        logger.info("openclipart: %d drawings of %d files, left out %s", len(titles), len(files), dict(skipped))
        partial = stored.with_suffix(".partial.npz")
        np.savez_compressed(partial, titles=np.array(titles), pictures=np.stack(pictures))
        partial.rename(stored)
    with np.load(stored) as arrays:
        return [Drawing(title=t, pixels=p) for t, p in zip(arrays["titles"].tolist(), arrays["pictures"], strict=True)]


def usable_title(path: Path, root: Path, words: frozenset[str], skipped: collections.Counter[str]) -> str | None:
    """The cleaned title of a file, or None with the reason counted in ``skipped``."""
    if _SERIES.search(str(path.relative_to(root).parent)) or path.stat().st_size > _MAX_BYTES:
        skipped["series or oversized"] += 1
        return None
    text = path.read_text(encoding="utf-8", errors="replace")
    licenses = _LICENSE.findall(text)
    if not licenses or not all(re.search(r"public ?domain", found, re.I) for found in licenses):
        skipped["licence not stated as public domain"] += 1
        return None
    found = _TITLE.search(text)
    reason = "no title of use"
    # A series often names itself in every title; then the file name says what is drawn.
    for candidate in (found.group(1) if found else "", re.sub(r"(?<=[a-z])\d+$|_(?:[a-z]_)?$", "", path.stem)):
        title = clean_title(candidate)
        if not 2 < len(title) <= 48 or _JUNK.search(title):
            continue
        parts = re.findall(r"[a-z]+", title)
        known = sum(w == "a" or (len(w) > 1 and (w in words or w.removesuffix("s") in words)) for w in parts)
        if parts and max(map(len, parts)) > 2 and known >= 0.75 * len(parts):
            return title
        reason = "title not English words"
        break
    skipped[reason] += 1
    return None


def clean_title(title: str) -> str:
    """A title as a caption: author prefixes, counters and underscores removed."""
    title = re.sub(r"&[a-z#0-9]+;", " ", title)
    title = re.sub(r"^clipart by [^-]*-", "", strip_text(title), flags=re.I).replace("_", " ")
    title = re.sub(r"\.(svg|png)$|\bby [A-Z][\w. ]*$|\([^)]*\)", " ", title)
    title = re.sub(r"(?<=[a-z])(?=[A-Z][a-z])", " ", title)
    title = re.sub(
        r"[-#\s]*\b(v|version|no|nr|number)?\.?\s*\d+\w{0,2}\b\s*$|(?<=[a-z])\d+$", "", strip_text(title), flags=re.I
    )
    return strip_text(title.strip(" -.,:;!?'\"")).lower()

"""Tux Paint's stamps: photographs and drawings, a caption in up to 78 languages, and people who read captions aloud.

One person a language did most of the reading, so speaker and language are the same thing here. The package is GPL-2:
it is fetched by whoever builds with it and is no part of this one.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from omnimoe.data.pictures import SIDE, PictureError, render_svg, scaled, strip_text, to_square
from omnimoe.data.sources import Source, fetch

logger = logging.getLogger(__name__)

STAMPS = Source(
    name="tuxpaint",
    kind="deb",
    package="tuxpaint-stamps-default",
    version="2022.06.04-1",
    sha256="6db6c1bfc870a47f1499d6203b083522eacb57c5f9c87d468f2e92eb6d9d5f34",
    license="GPL-2.0-only",
    credit="Bill Kendrick and the contributors of Tux Paint",
    homepage="https://tuxpaint.org",
    used="pictures, captions, human recordings of captions",
)

_CAPTION = re.compile(r"^([A-Za-z]+(?:_[A-Z]+)?(?:@[a-z]+)?)\.utf8=(.*)$")


@dataclass(frozen=True, kw_only=True)
class Stamp:
    """A picture with its captions.

    Args:
        topic: the folder it lies in, such as ``animals``.
        pixels: ``(side, side, 3)`` uint8.
        captions: language to caption, English among them; languages are written as ``pt-br``.
        recordings: language to a file in which the caption is read aloud.
    """

    topic: str
    pixels: np.ndarray
    captions: dict[str, str]
    recordings: dict[str, Path]


def read_stamps(cache: str | os.PathLike[str] | None = None, side: int = SIDE) -> Iterator[Stamp]:
    """All stamps that have a picture, in path order."""
    root = fetch(STAMPS, cache) / "usr/share/tuxpaint/stamps"
    for path in tqdm(sorted(root.rglob("*.txt")), desc="stamps", disable=None):
        captions = read_captions(path)
        try:
            pixels = _picture(path, side)
        except (PictureError, OSError) as error:
            logger.warning("stamp %s has no picture of use: %s", path.relative_to(root), error)
            continue
        if pixels is not None and captions.get("en"):
            topic = path.relative_to(root).parts[0]
            recordings = {lang: file for lang, file in _recordings(path).items() if lang in captions}
            yield Stamp(topic=topic, pixels=pixels, captions=captions, recordings=recordings)


def read_captions(path: Path) -> dict[str, str]:
    """Language to caption of a stamp's text file: English in the first line, then ``ll.utf8=caption``."""
    first, *others = path.read_text(encoding="utf-8", errors="replace").splitlines() or [""]
    captions = {"en": _clean(first)}
    for line in others:
        found = _CAPTION.match(line)
        if found and _clean(found[2]):
            captions.setdefault(language(found[1]), _clean(found[2]))
    return captions


def language(code: str) -> str:
    """A locale as a language tag: ``pt_BR`` to ``pt-br``, ``ca@valencia`` to ``ca-valencia``."""
    return re.sub("[_@]", "-", code).lower()


def _clean(caption: str) -> str:
    # A bar marks where Tux Paint may break the line.
    return strip_text(caption.replace("|", " "))


def _picture(path: Path, side: int) -> np.ndarray | None:
    drawing, raster = path.with_suffix(".svg"), path.with_suffix(".png")
    if drawing.exists():
        return render_svg(drawing.read_text(encoding="utf-8", errors="replace"), side)
    if raster.exists():
        # By way of 128, as drawings are, so that the small picture is the large one scaled.
        return scaled(to_square(Image.open(raster), 128), side)
    return None


def _recordings(path: Path) -> dict[str, Path]:
    found: dict[str, Path] = {}
    for file in sorted(path.parent.iterdir()):
        named = re.fullmatch(re.escape(path.stem) + r"_desc(?:_([a-z]{2,3}))?\.(?:ogg|wav)", file.name)
        if named:
            found.setdefault(named[1] or "en", file)
    return found

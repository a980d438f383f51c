"""Emoji: one concept in up to eight drawing styles, with labels in many languages and English keywords.

Only styles whose licence allows any use with credit are here; OpenMoji and EmojiOne 1 are share-alike and left out.
The icon sets share one format, so a style is a line in :data:`STYLES`.
"""

from __future__ import annotations

import json
import logging
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from omnimoe.data.pictures import SIDE, PictureError, picture_cache, render_svg
from omnimoe.data.sources import Source, cache_folder, fetch

logger = logging.getLogger(__name__)


def _icons(name: str, version: str, sha256: str, license: str, credit: str, homepage: str) -> Source:
    return Source(
        name=name,
        kind="npm",
        package=f"@iconify-json/{name}",
        version=version,
        sha256=sha256,
        license=license,
        credit=credit,
        homepage=homepage,
        used="emoji drawings",
    )


LABELS = Source(
    name="emojibase",
    kind="npm",
    package="emojibase-data",
    version="17.0.0",
    sha256="d01d0e2ca4e22cb402679532155342c71e2e871f25c32223c013b8b166ebdf5a",
    license="MIT AND Unicode-3.0",
    credit="Miles Johnson; labels from the Unicode Common Locale Data Repository, Unicode, Inc.",
    homepage="https://emojibase.dev",
    used="emoji labels in many languages, English keywords",
)

STYLES: tuple[Source, ...] = (
    _icons(
        "noto",
        "1.2.9",
        "3e918d88fc945c0bb3d468dbace6f88caef67f01c9f0e7bcae0915a042e8f1ad",
        "Apache-2.0",
        "Google Inc (Noto Emoji)",
        "https://github.com/googlefonts/noto-emoji",
    ),
    _icons(
        "noto-v1",
        "1.2.5",
        "2bf62c26c2c2884aa99e90aec942cdaee17a5921f05690694f4978ad4b017c37",
        "Apache-2.0",
        "Google Inc (Noto Emoji, first version)",
        "https://github.com/googlefonts/noto-emoji",
    ),
    _icons(
        "twemoji",
        "1.2.5",
        "19046dff7d8707ce96212ec86468b36ac5f8e60409629dd13f809265c6d0ebb7",
        "CC-BY-4.0",
        "Twitter, Inc and other contributors (Twemoji)",
        "https://github.com/jdecked/twemoji",
    ),
    _icons(
        "fluent-emoji",
        "1.2.7",
        "8044210dbf11e016d4de85f15d01a243423bd832457e7e2491df1b751c0e272b",
        "MIT",
        "Microsoft Corporation (Fluent Emoji)",
        "https://github.com/microsoft/fluentui-emoji",
    ),
    _icons(
        "fluent-emoji-flat",
        "1.2.6",
        "7d064769dee690815f823bc5bcc511d957198caf9f5edd8dd9c1aa48a6aeb175",
        "MIT",
        "Microsoft Corporation (Fluent Emoji)",
        "https://github.com/microsoft/fluentui-emoji",
    ),
    _icons(
        "emojione",
        "1.2.3",
        "26a14f44284407e8bcde91799388dca2bfd91dbcd55a97f425524a1c5b73610e",
        "CC-BY-4.0",
        "EmojiOne and EmojiTwo contributors",
        "https://github.com/EmojiTwo/emojitwo",
    ),
    _icons(
        "fxemoji",
        "1.2.2",
        "f3e72b3c59d05e1db03b7e308d55c0d05bd7ba3f625a90da1b79313c12858eef",
        "Apache-2.0",
        "Mozilla (FxEmojis)",
        "https://github.com/mozilla/fxemoji",
    ),
    _icons(
        "streamline-emojis",
        "1.2.4",
        "5dac87c876b322500989828c5823143e0100d78881627a2e4081a4b897cbfdbc",
        "CC-BY-4.0",
        "Streamline (Streamline Emojis)",
        "https://github.com/webalys-hq/streamline-vectors",
    ),
)

_NAMED_BY_CODE = ("noto", "twemoji", "fluent-emoji-flat")
_COMPONENT_GROUP = 2


@dataclass(frozen=True, kw_only=True)
class Emoji:
    """One emoji.

    Args:
        code: code points in hexadecimal, joined by ``-``, without the variation selector.
        label: English label, written as a caption.
        tags: English keywords.
        labels: language to label, English left out.
        topic: the group it is listed in, such as ``animals-nature``.
    """

    code: str
    label: str
    tags: tuple[str, ...]
    labels: dict[str, str]
    topic: str


def read_emoji(cache: str | os.PathLike[str] | None = None) -> list[Emoji]:
    """All emoji that are pictures by themselves (no skin tones, no regional letters), in the order of the data."""
    folder = fetch(LABELS, cache) / "package"
    languages = sorted(p.parent.name for p in folder.glob("*/data.json") if p.parent.name not in ("en", "en-gb"))
    labels: dict[str, dict[str, str]] = {}
    for language in languages:
        for entry in _json(folder / language / "data.json"):
            if entry.get("label"):
                labels.setdefault(_code(entry["hexcode"]), {})[language] = entry["label"]
    topics = _json(folder / "meta" / "groups.json")["groups"]
    emoji = []
    for entry in _json(folder / "en" / "data.json"):
        if entry.get("group") in (None, _COMPONENT_GROUP):
            continue
        code = _code(entry["hexcode"])
        emoji.append(
            Emoji(
                code=code,
                label=_caption(entry["label"]),
                tags=tuple(entry.get("tags", ())),
                labels=labels.get(code, {}),
                topic=topics[str(entry["group"])],
            )
        )
    return emoji


def render_style(
    style: Source, emoji: list[Emoji], cache: str | os.PathLike[str] | None = None, side: int = SIDE
) -> dict[str, list[np.ndarray]]:
    """The pictures of one style.

    Returns:
        Code of the emoji to its pictures (one; a few in a style that draws variants), ``(side, side, 3)`` uint8 each.
    """
    stored = cache_folder(cache) / picture_cache(f"{style.name}-{style.version}-{len(emoji)}", side)
    if not stored.exists():
        names = _icon_names(style, emoji, cache)
        icons = _json(fetch(style, cache) / "package" / "icons.json")
        codes, pictures, failed = [], [], 0
        for name, code in tqdm(names, desc=f"drawings of {style.name}", disable=None):
            try:
                pictures.append(render_svg(_document(icons, name), side))
                codes.append(code)
            except PictureError:
                failed += 1
        logger.info("%s: %d pictures, %d blank or unreadable", style.name, len(pictures), failed)
        partial = stored.with_suffix(".partial.npz")
        np.savez_compressed(partial, codes=np.array(codes), pictures=np.stack(pictures))
        partial.rename(stored)
    with np.load(stored) as arrays:
        codes, stack = arrays["codes"].tolist(), arrays["pictures"]
    by_code: dict[str, list[np.ndarray]] = {}
    for code, picture in zip(codes, stack, strict=True):
        by_code.setdefault(code, []).append(picture)
    return by_code


def _icon_names(style: Source, emoji: list[Emoji], cache: str | os.PathLike[str] | None) -> list[tuple[str, str]]:
    """Pairs of icon name and emoji code. Three sets list code points; the others use the same names."""
    by_name: dict[str, str] = {}
    known = {e.code for e in emoji}
    for other in STYLES:
        if other.name in _NAMED_BY_CODE:
            for code, name in _json(fetch(other, cache) / "package" / "chars.json").items():
                if _code(code) in known:
                    by_name.setdefault(_squash(name), _code(code))
    for e in emoji:
        by_name.setdefault(_squash(e.label.replace("flag of ", "flag for ")), e.code)
    icons = _json(fetch(style, cache) / "package" / "icons.json")
    pairs, taken = [], set()
    own = style.name in _NAMED_BY_CODE
    chars = _json(fetch(style, cache) / "package" / "chars.json") if own else {}
    for code, name in chars.items():
        if _code(code) in known and _code(code) not in taken:
            taken.add(_code(code))
            pairs.append((name, _code(code)))
    if not own:
        for name in sorted({*icons["icons"], *icons.get("aliases", {})}):
            # Streamline numbers its variants of one emoji: fox-face-1, fox-face-2.
            code = by_name.get(_squash(re.sub(r"-[12]$", "", name) if style.name == "streamline-emojis" else name))
            if code is not None and (code not in taken or style.name == "streamline-emojis"):
                taken.add(code)
                pairs.append((name, code))
    return sorted(pairs, key=lambda pair: (pair[1], pair[0]))


def _document(icons: dict, name: str) -> str:
    entry = icons["icons"].get(name)
    while entry is None:
        alias = icons["aliases"][name]
        if alias.keys() - {"parent", "hidden"}:
            raise PictureError(f"{name} is a turned copy of another icon")
        name = alias["parent"]
        entry = icons["icons"].get(name)
    width, height = entry.get("width", icons.get("width", 16)), entry.get("height", icons.get("height", 16))
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'width="{width}" height="{height}" '
        f'viewBox="{entry.get("left", 0)} {entry.get("top", 0)} {width} {height}">{entry["body"]}</svg>'
    )


def _caption(label: str) -> str:
    return label.replace("flag: ", "flag of ").replace("keycap: ", "keycap ")


def _code(hexcode: str) -> str:
    return "-".join(part for part in hexcode.lower().split("-") if part != "fe0f")


def _squash(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower())


def _json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))

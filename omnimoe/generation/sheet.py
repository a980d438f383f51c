"""A contact sheet: the samples of each prompt side by side over its caption, pixel for pixel."""

from __future__ import annotations

from collections.abc import Sequence
from os import PathLike
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from omnimoe.generation.media import GenerationError

_GAP, _MARGIN, _FONT_SIZE, _LINES = 4, 14, 13, 3
_INK, _PAPER, _FRAME = "#222222", "#ffffff", "#d8d8d8"


def draw_sheet(
    groups: Sequence[Sequence[np.ndarray]],
    captions: Sequence[str],
    path: str | PathLike[str],
    *,
    scale: int = 2,
    width: int = 1_200,
) -> Path:
    """Writes pictures with captions as one picture.

    Args:
        groups: the samples of each prompt, ``(H, W, 3)`` uint8 of one size.
        captions: a text for each group, at most three lines of it.
        path: where it goes; the ending gives the format.
        scale: screen pixels a pixel takes, without smoothing.
        width: of the sheet in pixels, at least as wide as one group.

    Returns:
        The path.

    Raises:
        GenerationError: if there is nothing to draw, or pictures differ in size.
    """
    shapes = {picture.shape for group in groups for picture in group}
    if len(shapes) != 1 or len(next(iter(shapes))) != 3:
        raise GenerationError(f"a sheet shows pictures (H, W, 3) of one size, got {sorted(shapes) or 'none'}")
    height, side = next(iter(shapes))[:2]
    height, side = height * scale, side * scale
    most = max(map(len, groups))
    card = most * (side + _GAP) - _GAP
    columns = max(1, min(len(groups), (width - _MARGIN) // (card + _MARGIN)))
    font = _font()
    wrapped = [_wrap(caption, card, font) for caption in captions]
    line = int(_FONT_SIZE * 1.35)
    rows = [range(start, min(start + columns, len(groups))) for start in range(0, len(groups), columns)]
    depths = [height + 6 + line * max(len(wrapped[place]) for place in row) for row in rows]
    size = (columns * (card + _MARGIN) + _MARGIN, sum(depths) + _MARGIN * (len(rows) + 1))
    sheet = Image.new("RGB", size, _PAPER)
    pen = ImageDraw.Draw(sheet)
    top = _MARGIN
    for row, depth in zip(rows, depths, strict=True):
        for column, place in enumerate(row):
            left = _MARGIN + column * (card + _MARGIN)
            for number, picture in enumerate(groups[place]):
                x = left + number * (side + _GAP)
                sheet.paste(Image.fromarray(picture).resize((side, height), Image.Resampling.NEAREST), (x, top))
                pen.rectangle((x - 1, top - 1, x + side, top + height), outline=_FRAME)
            for number, text in enumerate(wrapped[place]):
                pen.text((left, top + height + 5 + number * line), text, fill=_INK, font=font)
        top += depth + _MARGIN
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(path)
    return path


def _font() -> ImageFont.FreeTypeFont:
    # matplotlib brings a font with Latin, Greek, Cyrillic, Arabic and Hebrew letters, Pillow's own is Latin alone
    import matplotlib

    return ImageFont.truetype(str(Path(matplotlib.get_data_path(), "fonts", "ttf", "DejaVuSans.ttf")), _FONT_SIZE)


def _wrap(text: str, width: int, font: ImageFont.FreeTypeFont) -> list[str]:
    """Lines of at most ``width`` pixels; what does not fit ends in an ellipsis."""
    lines: list[str] = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if font.getlength(longer) <= width or not lines[-1]:
            lines[-1] = longer
        else:
            lines.append(word)
    if len(lines) > _LINES:
        lines = [*lines[:_LINES], "…"]
        lines[_LINES - 1] += "…"
        lines = lines[:_LINES]
    for number, line in enumerate(lines):
        while font.getlength(line) > width and len(line) > 2:
            line = line.rstrip("…")[:-1] + "…"
        lines[number] = line
    return lines

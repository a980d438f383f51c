"""Vector drawings to small squares on white, the one picture format of the corpus."""

from __future__ import annotations

import io
import re

import numpy as np
from PIL import Image

SIDE = 64
IMAGE_SIZES = (64, 128)
_RENDER = 128


class PictureError(ValueError):
    """A drawing that cannot be rendered, or renders to nothing."""


def render_svg(svg: str, side: int = SIDE) -> np.ndarray:
    """Renders a drawing, centred on a white square.

    System fonts are not used, so the result depends on the drawing alone; text inside a drawing is left out. Drawings
    are rendered at 128 pixels; the picture of 64 is that of 128 scaled down, see :func:`scaled`.

    Args:
        svg: the document as text.
        side: width and height in pixels, at most 128.

    Returns:
        ``(side, side, 3)`` uint8, RGB.

    Raises:
        PictureError: if the document is not a drawing or the picture is blank.
    """
    try:
        import resvg_py
    except ImportError:
        raise ImportError(
            "resvg_py is not installed and drawings are rendered with it: pip install 'omnimoe[data]'"
        ) from None
    try:
        # Documents sized in mm or pt need a resolution; without one the renderer refuses them.
        png = resvg_py.svg_to_bytes(svg_string=svg, width=_RENDER, height=_RENDER, dpi=96, skip_system_fonts=True)
    except (ValueError, RuntimeError, TypeError) as error:
        raise PictureError(f"drawing cannot be rendered: {error}") from None
    pixels = to_square(Image.open(io.BytesIO(bytes(png))), _RENDER)
    small = scaled(pixels, SIDE)
    # Judged at one size, so that every size has the same pictures.
    if int(small.min()) > 250 or np.ptp(small.reshape(-1, 3).astype(np.int16), axis=0).max() < 8:
        raise PictureError("drawing renders to a blank picture")
    return scaled(pixels, side)


def scaled(pixels: np.ndarray, side: int) -> np.ndarray:
    """A square picture ``(S, S, 3)`` uint8 at another size, ``(side, side, 3)``; itself if ``S`` is ``side``."""
    if pixels.shape[0] == side:
        return pixels
    return np.asarray(Image.fromarray(pixels).resize((side, side), Image.Resampling.LANCZOS), np.uint8)


def to_square(image: Image.Image, side: int = SIDE) -> np.ndarray:
    """Any Pillow image, centred on a white square and scaled.

    Returns:
        ``(side, side, 3)`` uint8, RGB.
    """
    image = image.convert("RGBA")
    longest = max(image.size)
    canvas = Image.new("RGBA", (longest, longest), "white")
    canvas.alpha_composite(image, ((longest - image.width) // 2, (longest - image.height) // 2))
    return np.asarray(canvas.convert("RGB").resize((side, side), Image.Resampling.LANCZOS), np.uint8)


def picture_cache(name: str, side: int) -> str:
    """File name in the cache for the rendered pictures of one source."""
    return f"pictures-{name}.npz" if side == SIDE else f"pictures-{name}-{side}px.npz"


def fingerprint(pixels: np.ndarray) -> bytes:
    """A coarse digest that two near-identical drawings share: mean colours of 16 x 16 cells in 8 levels.

    Fine line drawings are alike at that resolution whatever they show, so a nearly white picture is its own digest.

    Args:
        pixels: ``(S, S, 3)`` uint8, ``S`` a multiple of 16.
    """
    side = pixels.shape[0] // 16
    cells = (pixels.reshape(16, side, 16, side, 3).mean((1, 3)) // 32).astype(np.uint8)
    if int((cells.min(-1) < 7).sum()) < 16 or len(np.unique(cells.reshape(-1, 3), axis=0)) < 4:
        return pixels.tobytes()
    return cells.tobytes()


def strip_text(value: str) -> str:
    """Whitespace collapsed to single spaces, ends trimmed."""
    return re.sub(r"\s+", " ", value).strip()

"""Pictures of any kind and size to squares of pixels, and pixels to tensors and back."""

from __future__ import annotations

from os import PathLike, fspath
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from omnimoe.tokenizers.base import TokenizerError

LARGEST_SIDE = 8192
"""Pixels; longer pictures are shrunk before they are padded: a strip has few pixels, its square may have billions."""


def to_square(raw: Any, size: int) -> np.ndarray:
    """A picture of any kind and size on a white square: ``(size, size, 3)`` uint8.

    Args:
        raw: what :meth:`~omnimoe.tokenizers.picture.PictureTokenizer.encode` takes.
        size: side of the result in pixels.

    Raises:
        TokenizerError: if ``raw`` is not a picture.
    """
    if isinstance(raw, torch.Tensor):
        raw = raw.detach().cpu().numpy()
    if isinstance(raw, np.ndarray) and raw.dtype == np.uint8 and raw.shape == (size, size, 3):
        return raw
    picture = _opened(raw)
    side = max(picture.size)
    square = _on_white(picture, (side, side))
    return np.asarray(square if side == size else square.resize((size, size), Image.Resampling.BICUBIC), np.uint8)


def to_picture(raw: Any) -> Image.Image:
    """A picture of any kind and size as it is, in RGB on white.

    Raises:
        TokenizerError: if ``raw`` is not a picture.
    """
    picture = _opened(raw)
    return _on_white(picture, picture.size)


def to_middle(raw: Any, size: int) -> np.ndarray:
    """The middle of a picture whose shorter side is brought to ``size``: ``(size, size, 3)`` uint8.

    Args:
        raw: a picture of any kind and size.
        size: side of the result in pixels.

    Raises:
        TokenizerError: if ``raw`` is not a picture.
    """
    picture = to_picture(raw)
    if picture.size != (size, size):
        scale = size / min(picture.size)
        wide, tall = (max(size, round(scale * side)) for side in picture.size)
        left, top = (wide - size) // 2, (tall - size) // 2
        picture = picture.resize((wide, tall), Image.Resampling.LANCZOS).crop((left, top, left + size, top + size))
    return np.asarray(picture, np.uint8)


def _on_white(picture: Image.Image, size: tuple[int, int]) -> Image.Image:
    """An RGBA picture in the middle of a white RGB one of that width and height."""
    canvas = Image.new("RGBA", size, "white")
    canvas.alpha_composite(picture, ((size[0] - picture.width) // 2, (size[1] - picture.height) // 2))
    return canvas.convert("RGB")


def _opened(raw: Any) -> Image.Image:
    """Whatever a picture may come as, in RGBA, neither side longer than :data:`LARGEST_SIDE`."""
    if isinstance(raw, torch.Tensor):
        raw = raw.detach().cpu().numpy()
    if isinstance(raw, np.ndarray):
        picture = _from_array(raw)
    elif isinstance(raw, Image.Image):
        picture = raw
    elif isinstance(raw, str | PathLike):
        picture = _from_file(Path(fspath(raw)))
    else:
        raise TokenizerError(
            f"a picture is a path, a PIL image or a uint8 array (H, W, 3), not {type(raw).__name__}: {str(raw)[:60]!r}"
        )
    try:
        picture = picture.convert("RGBA")
    except (OSError, SyntaxError, ValueError) as error:
        raise TokenizerError(f"the picture cannot be read to its end: {error}; is the file complete?") from error
    if min(picture.size) < 1:
        raise TokenizerError(f"a picture needs at least one pixel, got {picture.width} x {picture.height}")
    if max(picture.size) > LARGEST_SIDE:
        picture.thumbnail((LARGEST_SIDE, LARGEST_SIDE), Image.Resampling.BICUBIC)
    return picture


def to_signed(pictures: np.ndarray) -> Tensor:
    """``(B, H, W, 3)`` uint8 to ``(B, 3, H, W)`` float32 in ``[-1, 1]``."""
    return torch.from_numpy(np.array(pictures)).permute(0, 3, 1, 2).float() / 127.5 - 1


def from_signed(pictures: Tensor) -> np.ndarray:
    """``(B, 3, H, W)`` to ``(B, H, W, 3)`` uint8; the inverse of :func:`to_signed`, clipping."""
    scaled = (pictures.float().clamp(-1, 1) + 1) * 127.5
    return scaled.round().byte().permute(0, 2, 3, 1).cpu().numpy()


def _from_array(raw: np.ndarray) -> Image.Image:
    channels_fit = raw.ndim == 2 or (raw.ndim == 3 and raw.shape[2] in (3, 4))
    if raw.dtype != np.uint8 or not channels_fit:
        raise TokenizerError(
            f"an array of a picture is uint8 of shape (H, W), (H, W, 3) or (H, W, 4), not {raw.dtype} {raw.shape}; "
            "scale floats to 0..255 and move channels last"
        )
    if not raw.size:
        raise TokenizerError(f"a picture needs at least one pixel, got an array of shape {raw.shape}")
    return Image.fromarray(np.ascontiguousarray(raw))


def _from_file(path: Path) -> Image.Image:
    try:
        picture = Image.open(path)
        picture.load()
    except FileNotFoundError:
        raise TokenizerError(f"no picture at {path}") from None
    except UnidentifiedImageError:
        raise TokenizerError(
            f"{path} is not a picture in a format that Pillow knows (png, jpeg, webp, gif, ...)"
        ) from None
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise TokenizerError(f"the picture {path} cannot be read: {error}") from error
    return picture

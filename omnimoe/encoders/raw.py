"""Raw inputs as the encoders take them; what cannot be one is refused as the tokenizers refuse it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from omnimoe.encoders.base import EncoderError
from omnimoe.tokenizers.base import TokenizerError
from omnimoe.tokenizers.raster import to_picture, to_square
from omnimoe.tokenizers.waveforms import to_waveform


def square_pictures(raws: Sequence[Any], size: int) -> np.ndarray:
    """Pictures of any kind and size, each on a white square.

    Args:
        raws: B paths, PIL images, or uint8 arrays or tensors ``(H, W, 3)``, ``(H, W, 4)`` or ``(H, W)``.
        size: side of the result in pixels.

    Returns:
        ``(B, size, size, 3)`` uint8.

    Raises:
        EncoderError: if one is not a picture; the message says which.
    """
    return np.stack(_each(raws, lambda raw: to_square(raw, size)))


def whole_pictures(raws: Sequence[Any]) -> list[Image.Image]:
    """Pictures of any kind and size as they are, in RGB on white; see :func:`square_pictures`."""
    return _each(raws, to_picture)


def _each(raws: Sequence[Any], read: Callable[[Any], Any]) -> list[Any]:
    pictures = []
    for place, raw in enumerate(raws):
        try:
            pictures.append(read(raw))
        except TokenizerError as error:
            raise EncoderError(f"input {place}: {error}") from error
    return pictures


def waveforms_at(raws: Sequence[Any], sample_rate: int, wanted_rate: int) -> list[Tensor]:
    """Clips at the rate an encoder hears.

    Args:
        raws: B clips ``(n,)``, floating point in [-1, 1] or int16, one channel.
        sample_rate: of the clips, in Hz.
        wanted_rate: of the result, in Hz.

    Returns:
        B tensors ``(n,)`` float32 on the CPU.

    Raises:
        EncoderError: if one is empty, has several channels, is not finite or lies out of range.
    """
    clips = []
    for place, raw in enumerate(raws):
        try:
            clips.append(to_waveform(raw, sample_rate, wanted_rate))
        except TokenizerError as error:
            raise EncoderError(f"input {place}: {error}") from error
    return clips

"""Other views of the same picture or clip, for training on few data with many passes.

A picture is scaled and moved a little on its white ground, a clip is played a little faster and begins a little later.
The tokens of a varied input differ nearly everywhere, what it shows or says does not: so a model cannot learn them by
heart. Speed perturbation of speech: https://www.isca-archive.org/interspeech_2015/ko15_interspeech.html.
"""

from __future__ import annotations

import numpy as np
from PIL import Image

SCALES = (0.84, 1.0)
"""Smallest and largest size of a varied picture, relative to what it was."""
SHIFT = 0.05
"""Farthest that its middle moves in each direction, in widths of the picture."""
SPEEDS = (1.0, 1.08)
"""Slowest and fastest that a clip is played; never slower, so no varied clip is longer than what it was."""


def vary_picture(picture: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """A picture at another size and place.

    Args:
        picture: ``(H, W, 3)`` uint8 on white ground.
        random: drawn from alone.

    Returns:
        The same shape and dtype; what comes in from outside is white.
    """
    height, width = picture.shape[:2]
    step = 1 / random.uniform(*SCALES)
    across, down = random.uniform(-SHIFT, SHIFT, 2) * (width, height)
    # the pixel (x, y) of the result is that at (step * x + left, step * y + top)
    left, top = (width - step * width) / 2 - across, (height - step * height) / 2 - down
    image = Image.fromarray(picture)
    placed = (step, 0, left, 0, step, top)
    moved = image.transform(
        image.size, Image.Transform.AFFINE, placed, resample=Image.Resampling.BICUBIC, fillcolor=(255, 255, 255)
    )
    return np.asarray(moved)


def vary_clip(samples: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """A clip a little faster, and higher with it, and begun a little later.

    Args:
        samples: ``(n,)`` int16 or floating point.
        random: drawn from alone.

    Returns:
        ``(m,)`` in the dtype of ``samples``, ``m <= n``.
    """
    speed = random.uniform(*SPEEDS)
    count = max(1, int(len(samples) / speed))
    faster = np.interp(np.arange(count) * speed, np.arange(len(samples)), samples)
    silence = np.zeros(int(random.integers(len(samples) - count + 1)))
    varied = np.concatenate([silence, faster])
    return (np.rint(varied) if np.issubdtype(samples.dtype, np.integer) else varied).astype(samples.dtype)

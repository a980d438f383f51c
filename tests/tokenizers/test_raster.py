"""Pictures of extreme shapes on their way to squares."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
from PIL import Image

from omnimoe.tokenizers.raster import LARGEST_SIDE, to_square


def test_a_long_strip_is_shrunk_before_it_is_padded(tmp_path):
    strip = np.zeros((2, 100_000, 3), np.uint8)
    Image.fromarray(strip).save(tmp_path / "strip.png")
    program = (
        "import resource, sys; from omnimoe.tokenizers.raster import to_square;"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss;"
        "square = to_square(sys.argv[1], 64);"
        "print(square.shape, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024)"
    )
    command = [sys.executable, "-c", program, str(tmp_path / "strip.png")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.startswith("(64, 64, 3)")
    # The whole square would take 40 GB.
    assert int(done.stdout.split()[-1]) < 2 * 2**30


def test_shrinking_keeps_the_middle():
    tall = np.zeros((LARGEST_SIDE * 2, LARGEST_SIDE // 4), np.uint8)
    square = to_square(tall, 64)
    assert (square[:, 31:33] < 10).all()
    assert (square[:, :20] == 255).all()

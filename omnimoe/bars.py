"""Progress bars of transformers, on terminals and in notebooks alone: in a log they are noise."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator


@contextlib.contextmanager
def bars_where_seen() -> Iterator[None]:
    """Switches transformers' bars off where nobody looks; ``HF_HUB_DISABLE_PROGRESS_BARS`` decides where it is set."""
    from huggingface_hub import constants
    from transformers.utils import logging

    is_seen = sys.stderr is not None and (sys.stderr.isatty() or "ipykernel" in sys.modules)
    if is_seen or constants.HF_HUB_DISABLE_PROGRESS_BARS is not None or not logging.is_progress_bar_enabled():
        yield
        return
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.enable_progress_bar()

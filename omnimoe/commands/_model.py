"""Options of the commands that run a trained model: which one, its tokenizers, and values by modality."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from omnimoe.model import OmniMoeForCausalLM
    from omnimoe.tokenizers import Tokenizer


DEFAULT = "omni_nano"
"""The model where none is named: the one that ships."""


def add_model(parser: argparse.ArgumentParser, default: str | None = None) -> None:
    """Adds ``--model``, ``--tokenizer`` and ``--device``."""
    parser.add_argument(
        "--model",
        required=default is None,
        default=default,
        help="folder of a saved model, Hub id, or a name of the zoo with weights",
    )
    parser.add_argument(
        "--tokenizer",
        action="append",
        default=[],
        metavar="MODALITY=NAME[:PATH]",
        help="the tokenizer a modality was trained with, if it is not the one that ships; may be repeated",
    )
    parser.add_argument("--device", metavar="DEVICE", help="such as cpu or cuda; the fastest there is if left out")


def default_device(device: str | None) -> str:
    """The device that is asked for, or the fastest there is."""
    import torch

    return device or ("cuda" if torch.cuda.is_available() else "cpu")


def read_model(name: str, device: str | None) -> OmniMoeForCausalLM:
    """The model of ``--model``, in evaluation mode; on a CPU in float32, elsewhere in the dtype it was saved in.

    Raises:
        ValueError: if the name has no weights.
    """
    import torch

    from omnimoe.hub import from_pretrained, load, model_info
    from omnimoe.model import MODELS

    device = default_device(device)
    # products of a few rows are faster in float32 there, and more exact
    dtype = "float32" if torch.device(device).type == "cpu" else "auto"
    if name in MODELS and not Path(name).is_dir():
        if model_info(name).pretrained is None:
            raise ValueError(f"there are no weights for {name!r}; train it first and pass the folder: --model DIR")
        return load(name, pretrained=True, device=device, dtype=dtype)
    return from_pretrained(name, device=device, dtype=dtype)


def read_tokenizers(given: list[str]) -> dict[str, Tokenizer]:
    """The tokenizers of ``--tokenizer``.

    Raises:
        ValueError: if an entry has another form, or names no tokenizer.
    """
    from omnimoe.tokenizers import load_tokenizer

    found = {}
    for entry in given:
        modality, equals, rest = entry.partition("=")
        name, _, path = rest.partition(":")
        if not (modality and equals and name):
            raise ValueError(f"--tokenizer takes MODALITY=NAME or MODALITY=NAME:PATH, got {entry!r}")
        found[modality] = load_tokenizer(name, path or None)
    return found


def by_modality(kind: Callable[[str], Any]) -> Callable[[str], Any]:
    """An argparse type: one number, ``0.9``, or numbers by modality, ``text=0.6,image=1.0``."""

    def read(given: str) -> Any:
        if "=" not in given:
            return kind(given)
        pairs = [entry.partition("=") for entry in given.split(",")]
        return {name.strip(): kind(value) for name, _, value in pairs}

    # argparse names the type in its message
    read.__name__ = f"number, or modality={kind.__name__},...,"
    return read

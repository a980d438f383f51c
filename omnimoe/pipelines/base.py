"""What a family of published models does from end to end, and which family a checkpoint belongs to."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from os import PathLike, fspath
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np
from PIL.Image import Image
from torch import Tensor

from omnimoe.checkpoint import CheckpointError, Hub, Source
from omnimoe.convert import find_converter
from omnimoe.hub import model_info
from omnimoe.model import MODELS
from omnimoe.registry import Registry

Part = str | Any
"""Words, a str; or a picture: a ``pathlib.Path``, a PIL image, or a uint8 array ``(H, W, 3)``."""

_BUILT_IN = ("bagel", "beit3", "chameleon", "cosmos3", "ernie4_5_vl", "pi0")


@dataclass(frozen=True, kw_only=True)
class Clip:
    """Pictures that move.

    Args:
        frames: ``(T, H, W, 3)`` uint8.
        fps: pictures a second.
        sound: ``(channels, n)`` float32, or None.
        sample_rate: of the sound, in Hz.
    """

    frames: np.ndarray
    fps: float
    sound: Tensor | None = None
    sample_rate: int = 0


class Pipeline:
    """A model with all that it needs to read and to write what people do.

    A subclass is filed under the name of its family's converter. What it cannot do raises, saying so.
    """

    targets: ClassVar[tuple[str, ...]] = ()
    """What it makes: ``"text"``, ``"image"``, ``"video"``."""

    @classmethod
    def from_pretrained(cls, source: str | PathLike[str], *, dtype: Any = "auto", device: Any = None) -> Self:
        """A checkpoint as it is published."""
        raise NotImplementedError(f"{cls.__name__} does not define from_pretrained(source)")

    def draw(
        self,
        documents: Sequence[Sequence[Part] | str],
        *,
        sizes: Sequence[tuple[int, int]] | tuple[int, int] | None = None,
        guidance: Any = None,
        steps: int | None = None,
        seed: int | None = None,
    ) -> list[np.ndarray]:
        """A picture ``(H, W, 3)`` uint8 for each document; None takes what the family was published with."""
        raise ValueError(f"{type(self).__name__} makes {', '.join(self.targets)} and draws no pictures")

    def film(
        self,
        documents: Sequence[Sequence[Part] | str],
        *,
        sizes: Sequence[tuple[int, int]] | tuple[int, int] | None = None,
        num_frames: int | None = None,
        guidance: Any = None,
        steps: int | None = None,
        seed: int | None = None,
    ) -> list[Clip]:
        """A clip for each document; None takes what the family was published with."""
        raise ValueError(f"{type(self).__name__} makes {', '.join(self.targets)} and no clips")

    def answer(
        self, documents: Sequence[Sequence[Part] | str], *, max_new_tokens: int = 512, **options: Any
    ) -> list[str]:
        """A text for each document."""
        raise ValueError(f"{type(self).__name__} makes {', '.join(self.targets)} and writes no text")

    def interleave(
        self,
        documents: Sequence[Sequence[Part] | str],
        *,
        max_new_tokens: int | None = None,
        guidance: Any = None,
        seed: int | None = None,
    ) -> list[list[Any]]:
        """Words and pictures for each document, as the model chooses: :class:`~omnimoe.generate.Generated` spans."""
        raise ValueError(
            f"{type(self).__name__} makes {', '.join(self.targets)} one at a time, not one after the other"
        )


def read_documents(given: Any, read: Callable[[Any], Any]) -> list[list[Any]]:
    """Documents as lists of parts, their pictures read.

    Args:
        given: a list of documents, each words or a list of words and pictures.
        read: what to do with a picture.

    Raises:
        ValueError: if what was given is one document or one part of it, or a document is empty.
    """
    if isinstance(given, str | PathLike | np.ndarray | Tensor | Image):
        raise ValueError(f"documents must be a list of documents, got one {type(given).__name__}; put it into a list")
    if not len(given):
        raise ValueError("there is no document; pass one or more")
    found = []
    for place, document in enumerate(given):
        if isinstance(document, PathLike | np.ndarray | Tensor | Image):
            raise ValueError(
                f"document {place} is a {type(document).__name__}; a document is words, or a list of words and "
                "pictures: [[picture, 'make it green']]"
            )
        parts = [document] if isinstance(document, str) else list(document)
        if not parts:
            raise ValueError(f"document {place} is empty; give it words or a picture")
        found.append([part if isinstance(part, str) else read(part) for part in parts])
    return found


PIPELINES: Registry[type[Pipeline]] = Registry("pipeline")
register_pipeline = PIPELINES.register


def _register_built_in() -> None:
    for name in _BUILT_IN:
        importlib.import_module(f"omnimoe.pipelines.{name}")


PIPELINES.on_first_use(_register_built_in)


def find_pipeline(source: str | PathLike[str]) -> tuple[type[Pipeline], str] | None:
    """The pipeline of a checkpoint and where it lies; None where its family has none, or it is a model of ours.

    Args:
        source: a name of the zoo, an existing folder, or an id on the Hub, of which the JSON files are fetched.

    Raises:
        CheckpointError: if there is no such repository.
    """
    name = fspath(source)
    if name in MODELS and not Path(name).is_dir():
        weights = model_info(name).pretrained
        if weights is None or weights.startswith("local-dir:"):
            return None
        name = weights
    try:
        place = Source.find(name, hub=Hub())
    except CheckpointError:
        return None  # whoever loads it says what it is not
    converter = find_converter(place.fetch())
    if converter is None or converter.name not in PIPELINES:
        return None
    return PIPELINES.get(converter.name), name

"""What a family of published models does from end to end, and which family a checkpoint belongs to."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from os import PathLike, fspath
from pathlib import Path
from typing import Any, ClassVar, Self, TypedDict, Unpack

import numpy as np
import torch
from PIL.Image import Image
from torch import Tensor

from omnimoe.catalogue import weights_of
from omnimoe.checkpoint import CheckpointError, Hub, Source
from omnimoe.convert import find_converter
from omnimoe.hub import from_pretrained
from omnimoe.inputs import check_whole
from omnimoe.model import MODELS, OmniMoeForCausalLM
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


class Loading(TypedDict, total=False):
    """What ``from_pretrained`` of every pipeline takes beside the source.

    Args:
        dtype: of the model, that of the file where left out; networks beside it stay in float32.
        device: where to put all.
        revision: branch, tag or commit, on the Hub.
        token: for what is private or gated.
        local_files_only: look on the Hub's local cache alone.
    """

    dtype: str | torch.dtype
    device: str | torch.device | None
    revision: str | None
    token: str | bool | None
    local_files_only: bool


class Pipeline:
    """A model with all that it needs to read and to write what people do.

    A subclass is filed under the name of its family's converter. What it cannot do raises, saying so.
    """

    targets: ClassVar[tuple[str, ...]] = ()
    """What it makes: ``"text"``, ``"image"``, ``"video"``."""

    @classmethod
    def from_pretrained(cls, source: str | PathLike[str], **options: Unpack[Loading]) -> Self:
        """A checkpoint as it is published; :func:`open_published` does what all families have in common.

        Args:
            source: a folder, an id on the Hub, or a name of the zoo.
            options: those of :class:`Loading`.
        """
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


def open_published(
    source: str | PathLike[str], files: Sequence[str] = ("*.json",), **options: Unpack[Loading]
) -> tuple[Path, Callable[[], OmniMoeForCausalLM]]:
    """A published checkpoint without its weights, and what loads them, so that what is lacking is told before.

    Args:
        source: as for :func:`omnimoe.from_pretrained`, or a name of the zoo.
        files: what is fetched beside the weights: names, and patterns of such.
        options: those of :class:`Loading`.

    Returns:
        The folder with the files in it, and a function without arguments that gives the model.

    Raises:
        CheckpointError: if a file is missing, malformed, or, when the model is loaded, does not fit.
        TypeError: if an option is unknown.
    """
    known = list(Loading.__annotations__)
    if unknown := next((name for name in options if name not in known), None):
        raise TypeError(f"from_pretrained of a pipeline has no option {unknown!r}; it has {', '.join(known)}")
    source = _address(source)
    asked: Any = {name: value for name, value in options.items() if name not in ("dtype", "device")}
    place = Source.find(source, hub=Hub(**asked))
    # with a name that reaches into a folder, patterns without one would too
    above = [name for name in files if "/" not in name]
    folder = place.fetch(above)
    if below := [name for name in files if "/" in name]:
        place.fetch(below, at=folder)
    return folder, partial(from_pretrained, source, **options)


def _address(source: str | PathLike[str]) -> str | PathLike[str]:
    """Where the weights of a name of the zoo lie, if there are any; what is no such name as it is."""
    if source not in MODELS or Path(source).is_dir():
        return source
    return weights_of(fspath(source)) or source


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
        if not isinstance(document, Sequence):
            raise ValueError(
                f"document {place} is of type {type(document).__name__}; a document is words, or a list of words and "
                "pictures: [[picture, 'make it green']]"
            )
        parts = [document] if isinstance(document, str) else list(document)
        if not parts:
            raise ValueError(f"document {place} is empty; give it words or a picture")
        found.append([part if isinstance(part, str) else read(part) for part in parts])
    return found


def document_seeds(seed: int | None, count: int) -> list[int | None]:
    """A seed for each document: ``seed + i``, so that one is drawn the same whatever it is drawn with.

    Raises:
        InputError: if the seed is no whole number of at least 0.
    """
    if seed is None:
        return [None] * count
    check_whole("seed", seed, least=0)
    return [seed + place for place in range(count)]


def noise_of(shapes: Sequence[tuple[int, ...]], seed: int | None) -> list[Tensor]:
    """Normal noise float32 on the CPU for each document, by the seeds of :func:`document_seeds`."""
    made = []
    for shape, own in zip(shapes, document_seeds(seed, len(shapes)), strict=True):
        generator = None if own is None else torch.Generator().manual_seed(own)
        made.append(torch.randn(shape, generator=generator))
    return made


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
    name = fspath(_address(fspath(source)))
    try:
        place = Source.find(name, hub=Hub())
    except CheckpointError:
        return None  # whoever loads it says what it is not
    converter = find_converter(place.fetch())
    if converter is None or converter.name not in PIPELINES:
        return None
    return PIPELINES.get(converter.name), name

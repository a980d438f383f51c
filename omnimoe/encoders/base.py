"""What an encoder is: raw input of one kind to rows of features, by a network that somebody else trained.

Unlike a tokenizer it has no way back. Reading the input (:meth:`Encoder.prepare`) and the network itself
(:meth:`Encoder.forward`) are apart, so that features can be computed once and kept, or anew in each step with a
gradient. The libraries and weights are extras: they are imported when an encoder is loaded, and missing ones are named.
"""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from omnimoe.config import Config as ConfigBase
from omnimoe.config import Configurable, register
from omnimoe.registry import Registry

ENCODERS: Registry[type[Encoder]] = Registry("encoder")

EXTRA = "pip install 'omnimoe[encoders]'"

_BUILT_IN = (
    *("efficientnet", "whisper", "minilm", "hf", "siglip", "merged", "rotary_vit"),
    *("patch_stem", "nested_stem", "wave_stem"),
)


class EncoderError(ValueError):
    """Raw input that cannot be encoded, or weights that are missing, damaged or of another kind."""


@dataclass(frozen=True, kw_only=True)
class Features:
    """What an encoder gives for B inputs.

    Args:
        rows: ``(B, n, C)``, one row for each place: a cell of a picture from the top left, a moment, a token.
        pooled: ``(B, P)``, one row for each input.
        mask: ``(B, n)`` bool, False at padding; None where nothing is padding.
        grid: rows and columns of the places, ``n`` in all; None where they have one axis.
        places: ``(B, n)`` int64, where each row stands in the largest picture that the encoder takes; None where all
            inputs have one ``grid``.
        shapes: ``(B, 3)`` int64, rows of each input along time, height and width; None where an encoder tells no such.
    """

    rows: Tensor
    pooled: Tensor
    mask: Tensor | None = None
    grid: tuple[int, int] | None = None
    places: Tensor | None = None
    shapes: Tensor | None = None

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: Any) -> Features:
        """The features of some of the inputs, by a slice, a list, or a tensor of indices or bools."""
        index = [index] if isinstance(index, int) else index
        return self._each(lambda part: part[index])

    def to(self, *args: Any, **kwargs: Any) -> Features:
        """As ``Tensor.to``; a dtype does not touch the mask, the places and the shapes."""
        moved = self._each(lambda part: part.to(*args, **kwargs))
        mask = None if moved.mask is None else moved.mask.bool()
        places = None if moved.places is None else moved.places.long()
        shapes = None if moved.shapes is None else moved.shapes.long()
        return dataclasses.replace(moved, mask=mask, places=places, shapes=shapes)

    def detach(self) -> Features:
        """The same without a graph."""
        return self._each(Tensor.detach)

    def _each(self, change: Any) -> Features:
        mask = None if self.mask is None else change(self.mask)
        places = None if self.places is None else change(self.places)
        held = {"mask": mask, "places": places, "shapes": None if self.shapes is None else change(self.shapes)}
        return dataclasses.replace(self, rows=change(self.rows), pooled=change(self.pooled), **held)

    @staticmethod
    def cat(parts: Sequence[Features]) -> Features:
        """Features of several batches as those of one, shorter ones padded with zeros."""
        length = max(part.rows.shape[1] for part in parts)
        is_ragged = any(part.mask is not None or part.rows.shape[1] < length for part in parts)
        rows, masks, places = [], [], []
        shapes = [part.shapes for part in parts if part.shapes is not None]
        for part in parts:
            missing = length - part.rows.shape[1]
            if part.places is not None:
                places.append(nn.functional.pad(part.places, (0, missing)))
            rows.append(nn.functional.pad(part.rows, (0, 0, 0, missing)))
            mask = part.mask if part.mask is not None else torch.ones_like(part.rows[..., 0], dtype=torch.bool)
            masks.append(nn.functional.pad(mask, (0, missing)))
        return Features(
            rows=torch.cat(rows),
            pooled=torch.cat([part.pooled for part in parts]),
            mask=torch.cat(masks) if is_ragged else None,
            grid=parts[0].grid,
            places=torch.cat(places) if places else None,
            shapes=torch.cat(shapes) if len(shapes) == len(parts) else None,
        )


class Encoder(nn.Module, Configurable):
    """Base of all encoders.

    A subclass sets the attributes below in its ``__init__(config, *, weights=True)``, which builds the network and,
    with ``weights``, fills it; it writes :meth:`prepare` and :meth:`forward`, and files itself with
    ``@register_encoder(name)``. An encoder starts frozen and in evaluation mode.

    Attributes:
        kind: what it reads: ``"image"``, ``"audio"`` or ``"text"``.
        hidden_size: width C of a row.
        num_tokens: rows of every input, or None where that follows the input.
    """

    registry: ClassVar[Registry | None] = ENCODERS
    kind: ClassVar[str]

    hidden_size: int
    num_tokens: int | None = None

    @dataclass(frozen=True, kw_only=True)
    class Config(ConfigBase):
        """An encoder."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config

    def prepare(self, raws: Sequence[Any], **options: Any) -> dict[str, Tensor]:
        """Raw inputs to what :meth:`forward` takes, on the CPU; each tensor has B entries along its first axis.

        Raises:
            EncoderError: if an input is not of this kind.
        """
        raise NotImplementedError(f"{type(self).__name__} does not define prepare(raws) -> dict of tensors")

    def forward(self, inputs: Mapping[str, Tensor]) -> Features:
        """Prepared inputs to features; gradients flow unless the encoder is frozen."""
        raise NotImplementedError(f"{type(self).__name__} does not define forward(inputs) -> Features")

    @torch.no_grad()
    def encode(self, raws: Sequence[Any], *, batch_size: int = 32, **options: Any) -> Features:
        """Raw inputs to features, without a gradient.

        Args:
            raws: B inputs of this kind.
            batch_size: how many go through the network at a time.
            options: what :meth:`prepare` takes besides.

        Raises:
            EncoderError: if there are none, or one is not of this kind.
        """
        if isinstance(raws, str | bytes) or not hasattr(raws, "__getitem__"):
            raise EncoderError(f"encode takes a sequence of inputs, not {type(raws).__name__}; put one into a list")
        if not len(raws):
            raise EncoderError("there is nothing to encode: the sequence is empty")
        if batch_size < 1:
            raise EncoderError(f"batch_size must be at least 1, got {batch_size}")
        starts = range(0, len(raws), batch_size)
        return Features.cat([self(self.prepare(raws[start : start + batch_size], **options)) for start in starts])

    def freeze(self, is_frozen: bool = True) -> Self:
        """Takes the weights out of training, and the network into evaluation mode; ``False`` undoes both."""
        self.requires_grad_(not is_frozen)
        return self.train(not is_frozen)

    @property
    def is_frozen(self) -> bool:
        """Whether no weight is trained."""
        return not any(parameter.requires_grad for parameter in self.parameters())

    def train(self, mode: bool = True) -> Self:
        """As in PyTorch, but what is frozen stays in evaluation mode: its statistics are weights too."""
        return super().train(mode and not self.is_frozen)

    @property
    def device(self) -> torch.device:
        """Where the weights lie."""
        return next(self.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights."""
        return next(self.parameters()).dtype


def register_encoder(name: str, *, exist_ok: bool = False):
    """Decorator that files an :class:`Encoder` class under ``name``.

    Raises:
        RegistryError: if the name is malformed or taken.
    """
    return register(ENCODERS, name, exist_ok=exist_ok)


def load_encoder(name: str, *, device: str | torch.device | None = None, **fields: Any) -> Any:
    """The encoder registered under ``name`` with its published weights, frozen and in evaluation mode.

    Args:
        name: ``"efficientnet_lite0"``, ``"whisper_tiny"``, ``"minilm"``, ``"hf_vision"``, ``"hf_audio"`` or one of
            your own.
        device: where to put it.
        fields: of its config, ``source="folder"`` for those of transformers.

    Raises:
        RegistryError: if the name is unknown; the message names the nearest.
        ConfigError: if a field is unknown.
        EncoderError: if the weights or a library are missing; the message says what to install.
    """
    encoder = ENCODERS.get(name).Config.from_dict({"type": name, **fields}).build()
    return encoder if device is None else encoder.to(device)


def _register_built_in() -> None:
    for name in _BUILT_IN:
        importlib.import_module(f"omnimoe.encoders.{name}")


ENCODERS.on_first_use(_register_built_in)

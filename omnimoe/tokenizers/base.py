"""What a tokenizer is: raw input of one modality to local ids ``0..vocab_size-1`` or to vectors, and back.

Ids are local: where they lie in a model's one vocabulary is the modality's business, not the tokenizer's. So a
tokenizer can be trained, shipped and tested without a model, and two models can place the same one differently. For the
same reason a tokenizer names its modality and its boundary markers, and their numbers are the model's.
"""

from __future__ import annotations

import importlib
import inspect
from dataclasses import dataclass
from os import PathLike
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from omnimoe.config import Config, Configurable, register
from omnimoe.registry import Registry

TOKENIZERS: Registry[type[Tokenizer]] = Registry("tokenizer")

_BUILT_IN = ("text", "bytes", "hf_text", "picture", "speech", "vq", "latents", "codec2", "neural_codecs", "video")

MARKERS: dict[str, tuple[str, str]] = {
    "image": ("<image>", "</image>"),
    "speech": ("<speech>", "</speech>"),
    "video": ("<video>", "</video>"),
}
"""Modality to the names of the markers that open and close its spans; text, which holds the markers, has none."""


SHIPPED = {"text": "text", "image": "picture", "speech": "speech", "video": "video"}
"""Modality to the registered name of the tokenizer that ships for it."""


class TokenizerError(ValueError):
    """Raw input that cannot be encoded, ids that cannot be decoded, or a tokenizer file that cannot be read."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Encoded:
    """One raw input as one span: discrete ids, continuous rows, or both of equal length.

    Args:
        modality: the tokenizer's modality. Its number (``modality_ids``) and its place in the vocabulary are given by a
            model's partition.
        positions: ``(n, 3)`` int64, time, row and column inside the span, from 0: ``(i, i, i)`` where there is one
            axis, ``(0, row, column)`` in a picture, ``(frame, row, column)`` in a video, as in multimodal rotary
            positions of Qwen2-VL. A document shifts them to where the span starts;
            :func:`omnimoe.data.documents.lay_out` takes row and column so, and counts time by tokens.
        ids: ``(n,)`` int64 local ids, or None.
        rows: ``(n, C)`` float32 vectors, or None.
        markers: names of the markers that belong before and after the span, or None where it needs none.

    Raises:
        TokenizerError: if there are neither ids nor rows, or lengths differ.
    """

    modality: str
    positions: Tensor
    ids: Tensor | None = None
    rows: Tensor | None = None
    markers: tuple[str, str] | None = None

    def __post_init__(self) -> None:
        lengths = {len(part) for part in (self.ids, self.rows) if part is not None}
        if lengths != {len(self.positions)}:
            raise TokenizerError(
                f"a span has {len(self.positions)} positions and {sorted(lengths) or 'no'} ids or rows; "
                "each position needs an id, a row or both"
            )

    def __len__(self) -> int:
        return len(self.positions)


class Tokenizer(Configurable):
    """Base of all tokenizers.

    A discrete tokenizer sets :attr:`vocab_size` and writes :meth:`encode` and :meth:`decode`; a continuous one sets
    :attr:`channels` and writes :meth:`encode_rows` and :meth:`decode_rows`; one may do both. All of them write
    :meth:`save_pretrained` and :meth:`from_pretrained`, and are filed with ``@register_tokenizer(name)``. Calling a
    tokenizer gives everything it knows of an input as :class:`Encoded`.

    Attributes:
        modality: usual name of the modality, a key of :data:`MARKERS` or ``"text"``; a model may use another.
        vocab_size: number of local ids, 0 where there are none.
        channels: width of a row, or ``None`` where there are no rows.
        num_tokens: length of every span, or ``None`` where it follows the input.
        grid: layout of a span in space, rows first: ``(8, 8)`` for a picture, and for each frame of a video; ``None``
            for one-dimensional spans.
        sample_rate: of decoded waveforms in Hz; ``None`` for what is not sound. What goes in is at 16,000 Hz unless
            ``encode(raw, sample_rate)`` is told another rate, whatever the tokenizer works at.
    """

    registry: ClassVar[Registry | None] = TOKENIZERS

    modality: str = "text"
    vocab_size: int = 0
    channels: int | None = None
    num_tokens: int | None = None
    grid: tuple[int, ...] | None = None
    sample_rate: int | None = None

    def __init__(self, config: Config) -> None:
        self.config = config

    @property
    def frame_size(self) -> int:
        """Tokens of a frame, where a span is a whole number of them; else 1."""
        return 1

    @property
    def is_discrete(self) -> bool:
        """Whether there are ids."""
        return self.vocab_size > 0

    @property
    def is_continuous(self) -> bool:
        """Whether there are rows."""
        return self.channels is not None

    @property
    def markers(self) -> tuple[str, str] | None:
        """Names of the begin and the end marker of a span, or None where it needs none."""
        return MARKERS.get(self.modality)

    def __call__(self, raw: Any, *arguments: Any, **options: Any) -> Encoded:
        """Raw input to a span with ids, rows or both, positions and the names of its markers.

        Args:
            raw: what :meth:`encode` and :meth:`encode_rows` take, and so are the other arguments.

        Raises:
            TokenizerError: if ``raw`` is not of this modality.

        Example:
            >>> span = load_tokenizer("bytes")("a lion")
            >>> len(span), span.modality, span.positions[-1].tolist()
            (6, 'text', [5, 5, 5])
        """
        ids = self.encode(raw, *arguments, **options) if self.is_discrete else None
        rows = self.encode_rows(raw, *arguments, **options) if self.is_continuous else None
        known = ids if ids is not None else rows
        if known is None:
            raise TokenizerError(f"{type(self).__name__} sets neither vocab_size nor channels; set one")
        return Encoded(
            modality=self.modality, positions=self.positions(len(known)), ids=ids, rows=rows, markers=self.markers
        )

    def positions(self, length: int) -> Tensor:
        """Time, row and column of each position of a span, ``(length, 3)`` int64, from 0; see :class:`Encoded`."""
        place = torch.arange(length)
        if self.grid is None or len(self.grid) != 2:
            return place.unsqueeze(1).repeat(1, 3)
        columns = self.grid[1]
        return torch.stack([torch.zeros_like(place), place // columns, place % columns], dim=1)

    def encode(self, raw: Any) -> Tensor:
        """Raw input to ids.

        Returns:
            ``(n,)`` int64 on the CPU, each in ``0..vocab_size-1``; ``n`` is :attr:`num_tokens` where that is set.

        Raises:
            TokenizerError: if ``raw`` is not of this modality.
        """
        if self.is_continuous:
            raise TokenizerError(f"{type(self).__name__} gives rows and no ids; call encode_rows")
        raise NotImplementedError(f"{type(self).__name__} does not define encode")

    def decode(self, ids: Any) -> Any:
        """Ids to raw input, as nearly as the codes allow.

        Args:
            ids: ``(n,)`` integers, a tensor, array or sequence.

        Raises:
            TokenizerError: if an id is out of range, or a span has another length than :attr:`num_tokens`.
        """
        if self.is_continuous:
            raise TokenizerError(f"{type(self).__name__} has no ids to decode; call decode_rows")
        raise NotImplementedError(f"{type(self).__name__} does not define decode")

    def encode_rows(self, raw: Any) -> Tensor:
        """Raw input to vectors.

        Returns:
            ``(n, C)`` float32 on the CPU; ``n`` is :attr:`num_tokens` where that is set, C is :attr:`channels`.

        Raises:
            TokenizerError: if ``raw`` is not of this modality, or the tokenizer gives ids alone.
        """
        if self.is_discrete and not self.is_continuous:
            raise TokenizerError(f"{type(self).__name__} gives ids and no rows; call encode")
        raise NotImplementedError(f"{type(self).__name__} does not define encode_rows")

    def decode_rows(self, rows: Any) -> Any:
        """Vectors to raw input, as nearly as they allow.

        Args:
            rows: ``(n, C)`` floating point, a tensor, array or sequence.

        Raises:
            TokenizerError: if the shape does not fit, or a value is not finite, or the tokenizer has ids alone.
        """
        if self.is_discrete and not self.is_continuous:
            raise TokenizerError(f"{type(self).__name__} has no rows to decode; call decode")
        raise NotImplementedError(f"{type(self).__name__} does not define decode_rows")

    @classmethod
    def from_pretrained(cls, path: str | PathLike[str] | None = None) -> Self:
        """Reads a tokenizer from a folder or file written by :meth:`save_pretrained`.

        Args:
            path: ``None`` for the weights that ship with the package.

        Raises:
            TokenizerError: if there is no such tokenizer or it does not fit this class.
        """
        raise NotImplementedError(f"{cls.__name__} does not define from_pretrained")

    def save_pretrained(self, path: str | PathLike[str]) -> None:
        """Writes the tokenizer where :meth:`from_pretrained` finds it.

        Args:
            path: a folder, made if need be; file names start with the tokenizer's registered name, so several
                tokenizers and a model can share one folder.
        """
        raise NotImplementedError(f"{type(self).__name__} does not define save_pretrained")

    def check_ids(self, ids: Any) -> Tensor:
        """Ids as an int64 tensor on the CPU, after the checks that every :meth:`decode` needs.

        Args:
            ids: ``(n,)`` or ``(B, n)`` integers, a tensor, array or sequence.

        Returns:
            The same shape, int64.

        Raises:
            TokenizerError: if ``ids`` are not integers, are out of range, or a span has the wrong length.
        """
        try:
            ids = torch.as_tensor(ids).detach().cpu()
        except (TypeError, ValueError, RuntimeError) as error:
            raise TokenizerError(
                f"ids must be a tensor or sequence of integers, not {type(ids).__name__}: {error}"
            ) from None
        if ids.shape == (0,):  # an empty list becomes a float tensor
            ids = ids.long()
        if ids.dtype == torch.bool or ids.is_floating_point() or ids.is_complex():
            raise TokenizerError(f"ids must be integers, not {ids.dtype}; pass the ids that encode returned")
        if ids.ndim not in (1, 2):
            raise TokenizerError(f"ids must be (n,) or (B, n), not {tuple(ids.shape)}")
        if self.num_tokens is not None and ids.shape[-1] != self.num_tokens:
            raise TokenizerError(f"a span has {self.num_tokens} ids, not {ids.shape[-1]}; pass one whole span")
        ids = ids.long()
        if ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < self.vocab_size:
            raise TokenizerError(
                f"ids must lie in 0..{self.vocab_size - 1}, got {int(ids.min())}..{int(ids.max())}; "
                "subtract the offset of the modality's range first"
            )
        return ids

    def check_rows(self, rows: Any) -> Tensor:
        """Rows as a float32 tensor on the CPU, after the checks that every :meth:`decode_rows` needs.

        Args:
            rows: ``(n, C)`` or ``(B, n, C)`` floating point, a tensor, array or sequence.

        Returns:
            The same shape, float32.

        Raises:
            TokenizerError: if ``rows`` are not finite numbers, have another width than :attr:`channels`, or a span has
                the wrong length.
        """
        try:
            rows = torch.as_tensor(rows).detach().cpu()
        except (TypeError, ValueError, RuntimeError) as error:
            raise TokenizerError(f"rows must be a tensor or sequence, not {type(rows).__name__}: {error}") from None
        if not rows.is_floating_point():
            raise TokenizerError(f"rows must be floating point, not {rows.dtype}; pass what encode_rows returned")
        if rows.ndim not in (2, 3) or rows.shape[-1] != self.channels:
            raise TokenizerError(
                f"rows must be (n, {self.channels}) or (B, n, {self.channels}), not {tuple(rows.shape)}"
            )
        if self.num_tokens is not None and rows.shape[-2] != self.num_tokens:
            raise TokenizerError(f"a span has {self.num_tokens} rows, not {rows.shape[-2]}; pass one whole span")
        rows = rows.float()
        if not bool(rows.isfinite().all()):
            raise TokenizerError(f"{int((~rows.isfinite()).sum())} of {rows.numel()} values are NaN or infinite")
        return rows


def register_tokenizer(name: str, *, exist_ok: bool = False):
    """Decorator that files a :class:`Tokenizer` class under ``name``.

    Raises:
        RegistryError: if the name is malformed or taken.
    """
    return register(TOKENIZERS, name, exist_ok=exist_ok)


def load_tokenizer(name: str, path: str | PathLike[str] | None = None, **options: Any) -> Tokenizer:
    """The tokenizer registered under ``name``, ready to use.

    Args:
        name: ``"text"``, ``"picture"``, ``"speech"``, an adapter such as ``"mimi"``, or one of your own.
        path: a folder or file of :meth:`Tokenizer.save_pretrained`; ``None`` for what ships with the package. An
            adapter also takes the folder or the Hub id of the model that it adapts.
        options: fields of an adapter's config, such as ``num_codebooks=8``; none for what ships.

    Raises:
        RegistryError: if the name is unknown; the message names the nearest.
        TokenizerError: if the file does not fit, or a package is missing that the tokenizer needs.
        ConfigError: if an option does not exist or is out of range.
    """
    kind = TOKENIZERS.get(name)
    try:
        inspect.signature(kind.from_pretrained).bind(path, **options)
    except TypeError as error:
        raise TokenizerError(f"tokenizer {name!r} is loaded without such options: {error}") from None
    return kind.from_pretrained(path, **options)


def _register_built_in() -> None:
    for name in _BUILT_IN:
        importlib.import_module(f"omnimoe.tokenizers.{name}")


TOKENIZERS.on_first_use(_register_built_in)

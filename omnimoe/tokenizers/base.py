"""What a tokenizer is: raw input of one modality to local ids ``0..vocab_size-1``, and back.

Ids are local: where they lie in a model's one vocabulary is the modality's business, not the tokenizer's. So a
tokenizer can be trained, shipped and tested without a model, and two models can place the same one differently.
"""

from __future__ import annotations

import importlib
from os import PathLike
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from omnimoe.config import Config, Configurable, register
from omnimoe.registry import Registry

TOKENIZERS: Registry[type[Tokenizer]] = Registry("tokenizer")

_BUILT_IN = ("text", "picture", "speech")


class TokenizerError(ValueError):
    """Raw input that cannot be encoded, ids that cannot be decoded, or a tokenizer file that cannot be read."""


class Tokenizer(Configurable):
    """Base of all tokenizers.

    A subclass sets the attributes below and writes :meth:`encode`, :meth:`decode`, :meth:`save_pretrained` and
    :meth:`from_pretrained`, then files itself with ``@register_tokenizer(name)``.

    Attributes:
        vocab_size: number of local ids.
        num_tokens: length of every span, or ``None`` where it follows the input.
        grid: layout of a span in space, rows first: ``(8, 8)`` for a picture; ``None`` for one-dimensional spans.
    """

    registry: ClassVar[Registry | None] = TOKENIZERS

    vocab_size: int
    num_tokens: int | None = None
    grid: tuple[int, ...] | None = None

    def __init__(self, config: Config) -> None:
        self.config = config

    def encode(self, raw: Any) -> Tensor:
        """Raw input to ids.

        Returns:
            ``(n,)`` int64 on the CPU, each in ``0..vocab_size-1``; ``n`` is :attr:`num_tokens` where that is set.

        Raises:
            TokenizerError: if ``raw`` is not of this modality.
        """
        raise NotImplementedError(f"{type(self).__name__} does not define encode")

    def decode(self, ids: Any) -> Any:
        """Ids to raw input, as nearly as the codes allow.

        Args:
            ids: ``(n,)`` integers, a tensor, array or sequence.

        Raises:
            TokenizerError: if an id is out of range, or a span has another length than :attr:`num_tokens`.
        """
        raise NotImplementedError(f"{type(self).__name__} does not define decode")

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


def register_tokenizer(name: str, *, exist_ok: bool = False):
    """Decorator that files a :class:`Tokenizer` class under ``name``.

    Raises:
        RegistryError: if the name is malformed or taken.
    """
    return register(TOKENIZERS, name, exist_ok=exist_ok)


def load_tokenizer(name: str, path: str | PathLike[str] | None = None) -> Tokenizer:
    """The tokenizer registered under ``name``, ready to use.

    Args:
        name: ``"text"``, ``"picture"``, ``"speech"`` or one of your own.
        path: a folder or file of :meth:`Tokenizer.save_pretrained`; ``None`` for what ships with the package.

    Raises:
        RegistryError: if the name is unknown; the message names the nearest.
        TokenizerError: if the file does not fit.
    """
    return TOKENIZERS.get(name).from_pretrained(path)


def _register_built_in() -> None:
    for name in _BUILT_IN:
        importlib.import_module(f"omnimoe.tokenizers.{name}")


TOKENIZERS.on_first_use(_register_built_in)

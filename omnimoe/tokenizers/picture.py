"""Our own picture tokenizers: an autoencoder whose grid is of discrete codes, or of continuous latents.

One cell of the grid stands for 8 x 8 pixels. Codes are FSQ (:mod:`omnimoe.tokenizers.fsq`), so none collapse; latents
are brought to unit variance, which is what a diffusion schedule expects.
"""

from __future__ import annotations

import dataclasses
from os import PathLike
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from omnimoe.config import Config as ConfigBase
from omnimoe.config import ConfigError
from omnimoe.tokenizers.autoencoder import PATCH, Bottleneck, GaussianLatent, PictureAutoencoder
from omnimoe.tokenizers.base import TokenizerError, register_tokenizer
from omnimoe.tokenizers.codec import CodecTokenizer
from omnimoe.tokenizers.fsq import FSQ
from omnimoe.tokenizers.raster import from_signed, to_signed, to_square

_CHUNK = 256


class PictureCodec(CodecTokenizer):
    """What the picture tokenizers share: the network, the grid, and one picture or a batch of them."""

    modality = "image"
    network: PictureAutoencoder

    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Config(ConfigBase):
        image_size: int = 64
        """Height and width of a picture in pixels, a multiple of 8; the grid has one cell for 8 x 8 pixels."""
        hidden_size: int = 200
        """Width of the network on the grid, a multiple of 5 and of ``num_heads``."""
        encoder_blocks: int = 3
        """Attention blocks of the encoder."""
        decoder_blocks: int = 4
        """Attention blocks of the decoder, which has the harder half of the work."""
        num_heads: int = 4
        """Attention heads of a block."""

    def __init__(self, config: PictureCodec.Config, bottleneck: Bottleneck) -> None:
        if config.image_size < PATCH or config.image_size % PATCH:
            raise ConfigError(f"image_size must be a multiple of {PATCH}, got {config.image_size}")
        if config.hidden_size % 5 or config.hidden_size % config.num_heads:
            raise ConfigError(
                f"hidden_size must be a multiple of 5 and of num_heads ({config.num_heads}), got {config.hidden_size}"
            )
        fields = {field.name: getattr(config, field.name) for field in dataclasses.fields(PictureCodec.Config)}
        super().__init__(config, PictureAutoencoder(**fields, bottleneck=bottleneck))
        self.image_size = config.image_size
        self.grid = (self.network.side, self.network.side)
        self.num_tokens = self.network.side**2

    def _encoded(self, raws: Any) -> list[tuple[Tensor, Tensor]]:
        """What the network's ``encode`` gives, for each chunk of pictures."""
        if isinstance(raws, str | PathLike | Image.Image):
            raise TokenizerError("a batch is a sequence of pictures; use encode or encode_rows for one")
        pictures = [to_square(raw, self.image_size) for raw in raws]
        return [
            self.network.encode(to_signed(np.stack(pictures[start : start + _CHUNK])).to(self.device))
            for start in range(0, len(pictures), _CHUNK)
        ]

    def _decoded(self, codes: Tensor) -> np.ndarray:
        """Codes ``(B, n, d)`` to pictures ``(B, S, S, 3)`` uint8."""
        return np.concatenate([from_signed(self.network.decode(part)) for part in codes.to(self.device).split(_CHUNK)])


@register_tokenizer("picture")
class PictureTokenizer(PictureCodec):
    """64 x 64 RGB to 64 ids of 1,000, row by row from the top left, and back.

    Example:
        >>> tokenizer = PictureTokenizer.from_pretrained()
        >>> ids = tokenizer.encode(np.full((64, 64, 3), 255, np.uint8))
        >>> ids.shape, tokenizer.decode(ids).shape
        (torch.Size([64]), (64, 64, 3))
    """

    shipped = "picture_64.safetensors"

    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Config(PictureCodec.Config):
        levels: tuple[int, ...] = (8, 5, 5, 5)
        """FSQ levels; their product is the vocabulary."""

    def __init__(self, config: PictureTokenizer.Config) -> None:
        self.fsq = FSQ(config.levels)
        super().__init__(config, self.fsq)
        self.vocab_size = self.fsq.num_codes

    def encode(self, raw: Any) -> Tensor:
        """One picture to ids.

        Args:
            raw: a path, a PIL image, or a uint8 array or tensor ``(H, W, 3)``, ``(H, W, 4)`` or ``(H, W)``, of any
                size: it is padded to a square and set on white, then resized.

        Returns:
            ``(64,)`` int64, row by row from the top left.

        Raises:
            TokenizerError: if ``raw`` is not a picture; the message says what was received.
        """
        return self.encode_batch([raw])[0]

    def decode(self, ids: Any) -> np.ndarray:
        """Ids ``(64,)`` to a picture, ``(64, 64, 3)`` uint8.

        Raises:
            TokenizerError: if there are not 64 ids, or one is out of range.
        """
        ids = self.check_ids(ids)
        if ids.ndim != 1:
            raise TokenizerError(f"decode takes the ids of one picture, not {tuple(ids.shape)}; use decode_batch")
        return self.decode_batch(ids[None])[0]

    @torch.no_grad()
    def encode_batch(self, raws: Any) -> Tensor:
        """Pictures to ids ``(B, 64)`` int64; ``raws`` is a sequence of what :meth:`encode` takes, or an array."""
        ids = [part.cpu() for _, part in self._encoded(raws)]
        return torch.cat(ids) if ids else torch.empty(0, self.network.side**2, dtype=torch.long)

    @torch.no_grad()
    def decode_batch(self, ids: Any) -> np.ndarray:
        """Ids ``(B, 64)`` to pictures ``(B, 64, 64, 3)`` uint8."""
        ids = self.check_ids(ids)
        if ids.ndim != 2:
            raise TokenizerError(
                f"decode_batch takes ids (B, {self.num_tokens}), not {tuple(ids.shape)}; use decode for one"
            )
        return self._decoded(self.fsq.ids_to_codes(ids.to(self.device)))


@register_tokenizer("picture_128")
class LargePictureTokenizer(PictureTokenizer):
    """128 x 128 RGB to 256 ids of 1,000, a grid of 16 x 16, and back; in all else as :class:`PictureTokenizer`."""

    shipped = "picture_128.safetensors"

    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Config(PictureTokenizer.Config):
        image_size: int = 128
        """Height and width of a picture in pixels, a multiple of 8."""


@register_tokenizer("picture_latents")
class PictureLatentTokenizer(PictureCodec):
    """64 x 64 RGB to 64 vectors of 16 channels, row by row from the top left, and back: for continuous modalities.

    Over the pictures it was trained on, every channel has mean 0 and variance 1.

    Example:
        >>> tokenizer = PictureLatentTokenizer.from_pretrained()
        >>> rows = tokenizer.encode_rows(np.full((64, 64, 3), 255, np.uint8))
        >>> rows.shape, tokenizer.decode_rows(rows).shape
        (torch.Size([64, 16]), (64, 64, 3))
    """

    shipped = "picture_latents_64.safetensors"

    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Config(PictureCodec.Config):
        channels: int = 16
        """Width of a latent."""

    def __init__(self, config: PictureLatentTokenizer.Config) -> None:
        if config.channels < 1:
            raise ConfigError(f"channels must be at least 1, got {config.channels}")
        super().__init__(config, GaussianLatent(config.channels))
        self.channels = config.channels
        # Measured on the training pictures after training, see `standardize`.
        self.network.register_buffer("shift", torch.zeros(config.channels))
        self.network.register_buffer("scale", torch.ones(config.channels))

    def encode_rows(self, raw: Any) -> Tensor:
        """One picture to latents ``(64, C)`` float32; ``raw`` is what :meth:`PictureTokenizer.encode` takes.

        Raises:
            TokenizerError: if ``raw`` is not a picture; the message says what was received.
        """
        return self.encode_rows_batch([raw])[0]

    def decode_rows(self, rows: Any) -> np.ndarray:
        """Latents ``(64, C)`` to a picture, ``(64, 64, 3)`` uint8.

        Raises:
            TokenizerError: if the shape does not fit or a value is not finite.
        """
        rows = self.check_rows(rows)
        if rows.ndim != 2:
            raise TokenizerError(
                f"decode_rows takes the rows of one picture, not {tuple(rows.shape)}; use decode_rows_batch"
            )
        return self.decode_rows_batch(rows[None])[0]

    @torch.no_grad()
    def encode_rows_batch(self, raws: Any) -> Tensor:
        """Pictures to latents ``(B, 64, C)`` float32; ``raws`` as for :meth:`PictureTokenizer.encode_batch`."""
        rows = [((part - self.network.shift) / self.network.scale).cpu() for part, _ in self._encoded(raws)]
        return torch.cat(rows) if rows else torch.empty(0, self.network.side**2, self.network.shift.numel())

    @torch.no_grad()
    def decode_rows_batch(self, rows: Any) -> np.ndarray:
        """Latents ``(B, 64, C)`` to pictures ``(B, 64, 64, 3)`` uint8."""
        rows = self.check_rows(rows)
        if rows.ndim != 3:
            raise TokenizerError(
                f"decode_rows_batch takes rows (B, {self.num_tokens}, {self.channels}), not {tuple(rows.shape)}"
            )
        return self._decoded(rows.to(self.device) * self.network.scale + self.network.shift)

    @torch.no_grad()
    def standardize(self, raws: Any) -> None:
        """Measures mean and deviation of each channel over ``raws``, so that rows of such pictures have 0 and 1."""
        self.network.shift.zero_()
        self.network.scale.fill_(1.0)
        rows = self.encode_rows_batch(raws).flatten(0, 1)
        self.network.shift.copy_(rows.mean(0))
        self.network.scale.copy_(rows.std(0).clamp_min(1e-6))

"""Pictures to continuous latents by the autoencoders of latent diffusion, diffusers' ``AutoencoderKL``.

A latent picture is cut into patches of p x p, each of which becomes one row, as Transfusion does it with 2 x 2
(https://arxiv.org/abs/2408.11039); p = 1 leaves a row to each latent cell. Rows are the mean of the posterior, not a
sample, so the same picture gives the same rows, and they are brought to unit scale with the numbers of the model's
config.
"""

from __future__ import annotations

from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from omnimoe.config import Config as ConfigBase
from omnimoe.config import ConfigError
from omnimoe.tokenizers.adapters import AdapterTokenizer, check_loaded
from omnimoe.tokenizers.base import TokenizerError, register_tokenizer
from omnimoe.tokenizers.raster import from_signed, to_signed, to_square

_CHUNK = 4


@register_tokenizer("autoencoder_kl")
class AutoencoderKlTokenizer(AdapterTokenizer):
    """Pictures to rows ``(n, latent channels * p * p)``, channel by channel, then row and column inside the patch.

    Args:
        config: sizes.
        model: diffusers' ``AutoencoderKL``, loaded.

    Raises:
        ConfigError: if the sizes do not fit the model.
    """

    modality = "image"
    library_class = "AutoencoderKL"

    config: Config
    grid: tuple[int, int]
    channels: int
    num_tokens: int

    @dataclass(frozen=True, kw_only=True)
    class Config(ConfigBase):
        image_size: int | None = None
        """Height and width of a picture in pixels; None for the ``sample_size`` of the model's config."""
        patch_size: int = 2
        """Latent cells on a side of a patch."""

    def __init__(self, config: Config, *, model: Any) -> None:
        super().__init__(config, model=model)
        held = model.config
        sample_size = held.sample_size if isinstance(held.sample_size, int) else min(held.sample_size)
        self.image_size = config.image_size or sample_size
        # Every level but the last halves the resolution.
        cell = 2 ** (len(held.block_out_channels) - 1)
        if config.patch_size < 1:
            raise ConfigError(f"patch_size must be at least 1, got {config.patch_size}")
        if self.image_size < cell * config.patch_size or self.image_size % (cell * config.patch_size):
            raise ConfigError(
                f"image_size must be a multiple of {cell * config.patch_size}, {cell} pixels a latent cell and "
                f"{config.patch_size} cells a patch; got {self.image_size}"
            )
        side = self.image_size // cell // config.patch_size
        self.grid = (side, side)
        self.num_tokens = side**2
        self.channels = held.latent_channels * config.patch_size**2
        centre = held.get("latents_mean") or [held.get("shift_factor") or 0.0] * held.latent_channels
        spread = held.get("latents_std") or [1.0] * held.latent_channels
        self._centre = torch.tensor(centre).view(1, -1, 1, 1)
        self._scale = (held.scaling_factor / torch.tensor(spread)).view(1, -1, 1, 1)

    @classmethod
    def load_model(cls, source: str) -> nn.Module:
        """diffusers' model from a local folder (a pipeline's with a folder ``vae`` too) or a Hub id.

        Raises:
            TokenizerError: if diffusers is not installed, or the model cannot be read.
        """
        try:
            import diffusers
        except ImportError as error:
            raise TokenizerError(
                f"autoencoder_kl needs diffusers ({error}): pip install 'omnimoe[diffusers]'"
            ) from error
        if (Path(source) / "vae" / "config.json").is_file():
            source = str(Path(source) / "vae")
        try:
            model, report = diffusers.AutoencoderKL.from_pretrained(
                source, torch_dtype=torch.float32, use_safetensors=True, output_loading_info=True
            )
        except Exception as error:  # whatever a wrong folder makes the library raise
            raise TokenizerError(f"{source} cannot be read as {cls.library_class}: {error}") from error
        check_loaded(report, cls.library_class, source)
        return model

    def encode_rows(self, raw: Any) -> Tensor:
        """One picture to rows ``(n, C)`` float32, row by row from the top left.

        Args:
            raw: a path, a PIL image, or a uint8 array or tensor ``(H, W)``, ``(H, W, 3)`` or ``(H, W, 4)``.

        Raises:
            TokenizerError: if ``raw`` is not a picture.
        """
        return self.encode_rows_batch([raw])[0]

    def decode_rows(self, rows: Any) -> np.ndarray:
        """Rows ``(n, C)`` of a whole picture to ``(S, S, 3)`` uint8.

        Raises:
            TokenizerError: if the shape does not fit, or a value is not finite.
        """
        rows = self.check_rows(rows)
        if rows.ndim != 2:
            raise TokenizerError(
                f"decode_rows takes the rows of one picture, not {tuple(rows.shape)}; use decode_rows_batch"
            )
        return self.decode_rows_batch(rows[None])[0]

    @torch.no_grad()
    def encode_rows_batch(self, raws: Any) -> Tensor:
        """Pictures to rows ``(B, n, C)`` float32."""
        if isinstance(raws, str | PathLike | Image.Image):
            raise TokenizerError("encode_rows_batch takes a sequence of pictures; use encode_rows for one")
        pictures = [to_square(raw, self.image_size) for raw in raws]
        rows = []
        for start in range(0, len(pictures), _CHUNK):
            # Another layout in memory may take another kernel, which rounds otherwise.
            pixels = to_signed(np.stack(pictures[start : start + _CHUNK])).contiguous().to(self.device)
            latents = self.model.encode(pixels).latent_dist.mode().cpu()
            rows.append(to_patches((latents - self._centre) * self._scale, self.config.patch_size))
        return torch.cat(rows) if rows else torch.empty(0, self.num_tokens, self.channels)

    @torch.no_grad()
    def decode_rows_batch(self, rows: Any) -> np.ndarray:
        """Rows ``(B, n, C)`` to pictures ``(B, S, S, 3)`` uint8."""
        rows = self.check_rows(rows)
        if rows.ndim != 3:
            raise TokenizerError(f"decode_rows_batch takes rows (B, n, {self.channels}), not {tuple(rows.shape)}")
        latents = from_patches(rows, self.grid, self.config.patch_size) / self._scale + self._centre
        made = [
            from_signed(self.model.decode(part.to(self.device)).sample) for part in latents.split(_CHUNK) if len(part)
        ]
        return np.concatenate(made) if made else np.zeros((0, self.image_size, self.image_size, 3), np.uint8)


def to_patches(latents: Tensor, patch_size: int) -> Tensor:
    """``(B, C, H * p, W * p)`` to rows ``(B, H * W, C * p * p)``."""
    batch, _, height, width = latents.shape
    p = patch_size
    cut = latents.reshape(batch, -1, height // p, p, width // p, p)
    return cut.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)


def from_patches(rows: Tensor, grid: tuple[int, ...], patch_size: int) -> Tensor:
    """Rows ``(B, H * W, C * p * p)`` to ``(B, C, H * p, W * p)``; the inverse of :func:`to_patches`."""
    p = patch_size
    cut = rows.reshape(len(rows), *grid, rows.shape[-1] // p**2, p, p)
    return cut.permute(0, 3, 1, 4, 2, 5).flatten(4).flatten(2, 3)

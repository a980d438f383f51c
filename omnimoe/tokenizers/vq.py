"""Pictures to ids by the published VQ models that transformers has: Chameleon, Emu3 and Janus.

A picture is padded to a white square of the size that the model takes, and its pixels go to ``[-1, 1]``, as in the
original code of all three. Ids are those of the codebook, row by row; a published language model may number them in
another order in its own vocabulary (``vocabulary_map`` of its config), which is for that model's partition to say.

Sources: https://arxiv.org/abs/2405.09818 (Chameleon), https://arxiv.org/abs/2409.18869 (Emu3),
https://arxiv.org/abs/2501.17811 (Janus-Pro).
"""

from __future__ import annotations

from dataclasses import dataclass
from os import PathLike
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from omnimoe.config import Config as ConfigBase
from omnimoe.config import ConfigError
from omnimoe.tokenizers.adapters import AdapterTokenizer
from omnimoe.tokenizers.base import TokenizerError, register_tokenizer
from omnimoe.tokenizers.raster import from_signed, to_signed, to_square

_CHUNK = 4


class VqPictureTokenizer(AdapterTokenizer):
    """What the three share; a subclass says how its class encodes and decodes.

    Args:
        config: the size of pictures.
        model: the class of transformers, loaded.
    """

    modality = "image"
    grid: tuple[int, int]
    num_tokens: int

    @dataclass(frozen=True, kw_only=True)
    class Config(ConfigBase):
        image_size: int | None = None
        """Height and width of a picture in pixels; None for what the model was published for."""

    def __init__(self, config: Config, *, model: Any) -> None:
        super().__init__(config, model=model)
        # Every level but the last halves the resolution.
        self.cell_size = 2 ** (len(model.config.channel_multiplier) - 1)
        self.image_size = config.image_size or self.published_size(model.config)
        if self.image_size < self.cell_size or self.image_size % self.cell_size:
            raise ConfigError(f"image_size must be a multiple of {self.cell_size}, got {self.image_size}")
        side = self.image_size // self.cell_size
        self.grid, self.num_tokens = (side, side), side**2
        self.vocab_size = model.quantize.embedding.num_embeddings

    def published_size(self, config: Any) -> int:
        """Side of a picture in pixels, where the user does not say."""
        return 512

    def encode(self, raw: Any) -> Tensor:
        """One picture to ids ``(n,)`` int64, row by row from the top left.

        Args:
            raw: a path, a PIL image, or a uint8 array or tensor ``(H, W)``, ``(H, W, 3)`` or ``(H, W, 4)``.

        Raises:
            TokenizerError: if ``raw`` is not a picture.
        """
        return self.encode_batch([raw])[0]

    def decode(self, ids: Any) -> np.ndarray:
        """Ids ``(n,)`` of a whole picture to ``(S, S, 3)`` uint8.

        Raises:
            TokenizerError: if the number of ids does not fit, one is out of range, or the model has no decoder.
        """
        ids = self.check_ids(ids)
        if ids.ndim != 1:
            raise TokenizerError(f"decode takes the ids of one picture, not {tuple(ids.shape)}; use decode_batch")
        return self.decode_batch(ids[None])[0]

    @torch.no_grad()
    def encode_batch(self, raws: Any) -> Tensor:
        """Pictures to ids ``(B, n)`` int64."""
        if isinstance(raws, str | PathLike | Image.Image):
            raise TokenizerError("encode_batch takes a sequence of pictures; use encode for one")
        pictures = [to_square(raw, self.image_size) for raw in raws]
        chunks = [pictures[start : start + _CHUNK] for start in range(0, len(pictures), _CHUNK)]
        # Another layout in memory may take another kernel, which rounds otherwise.
        ids = [self.to_ids(to_signed(np.stack(chunk)).contiguous().to(self.device)).cpu() for chunk in chunks]
        return torch.cat(ids) if ids else torch.empty(0, self.num_tokens, dtype=torch.long)

    @torch.no_grad()
    def decode_batch(self, ids: Any) -> np.ndarray:
        """Ids ``(B, n)`` to pictures ``(B, S, S, 3)`` uint8."""
        ids = self.check_ids(ids)
        if ids.ndim != 2:
            raise TokenizerError(
                f"decode_batch takes ids (B, {self.num_tokens}), not {tuple(ids.shape)}; use decode for one"
            )
        made = [from_signed(self.to_pixels(part.to(self.device))) for part in ids.split(_CHUNK) if len(part)]
        return np.concatenate(made) if made else np.zeros((0, self.image_size, self.image_size, 3), np.uint8)

    def to_ids(self, pixels: Tensor) -> Tensor:
        """``(B, 3, S, S)`` float32 in ``[-1, 1]`` to ids ``(B, n)``."""
        return self.model.encode(pixels).image_tokens.view(len(pixels), -1)

    def to_pixels(self, ids: Tensor) -> Tensor:
        """Ids ``(B, n)`` to ``(B, 3, S, S)``."""
        return self.model.decode(ids)


@register_tokenizer("chameleon_vq")
class ChameleonVqTokenizer(VqPictureTokenizer):
    """512 x 512 to 32 x 32 ids of 8,192, one way: the decoder was not published with this class."""

    library_class = "ChameleonVQVAE"

    def published_size(self, config: Any) -> int:
        return config.resolution

    def to_pixels(self, ids: Tensor) -> Tensor:
        raise TokenizerError("transformers' ChameleonVQVAE has no decoder, so its ids cannot be made a picture")


@register_tokenizer("emu3_vq")
class Emu3VqTokenizer(VqPictureTokenizer):
    """512 x 512 to 64 x 64 ids of 32,768, and back."""

    library_class = "Emu3VQVAE"

    def to_ids(self, pixels: Tensor) -> Tensor:
        sizes = torch.tensor([pixels.shape[-2:]] * len(pixels))
        return torch.stack(self.model.encode(pixels, sizes).image_tokens).flatten(1)

    def to_pixels(self, ids: Tensor) -> Tensor:
        return self.model.decode(ids.unflatten(1, self.grid))


@register_tokenizer("janus_vq")
class JanusVqTokenizer(VqPictureTokenizer):
    """As many cells as the config's ``num_patches`` squared, each one of 16,384 ids, and back.

    transformers looks up the nearest entry by distance and decodes entries of unit length; the two agree where the
    codebook has unit length already.
    """

    library_class = "JanusVQVAE"

    def __init__(self, config: VqPictureTokenizer.Config, *, model: Any) -> None:
        super().__init__(config, model=model)
        if self.grid[0] != model.config.num_patches:
            fixed = self.published_size(model.config)
            raise ConfigError(f"image_size is {fixed} in this model, which decodes no other; got {self.image_size}")

    def published_size(self, config: Any) -> int:
        return config.num_patches * 2 ** (len(config.channel_multiplier) - 1)

"""A SigLIP tower over pictures of any size and shape, as the models have it that took one in and trained it further.

A picture keeps its shape: it is cut into patches, and a patch takes the learned position of its row and column in the
largest square. Pictures of one batch are padded to one length and do not see each other. The layers are transformers'.
Its weights come with the model that it is a part of; alone it is untrained.

Source: SigLIP, https://arxiv.org/abs/2303.15343; patches of any shape, https://arxiv.org/abs/2307.06304.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from omnimoe.encoders.base import Encoder, EncoderError, Features, register_encoder
from omnimoe.encoders.raw import whole_pictures
from omnimoe.encoders.tower import TowerConfig


def fit_size(width: int, height: int, *, patch_size: int, shortest: int, longest: int) -> tuple[int, int]:
    """The size to bring a picture to: both sides multiples of the patch, its shape kept as nearly as that allows.

    Args:
        width: in pixels.
        height: in pixels.
        patch_size: side of a patch.
        shortest: the shorter side is brought up to it, unless the longer one would pass ``longest``.
        longest: the longer side is brought down to it.

    Returns:
        Width and height, each from one patch to ``longest``.
    """
    scale = max(1.0, shortest / min(width, height))
    scale = min(scale, longest / max(width, height))
    most = longest // patch_size
    sides = (min(max(round(side * scale / patch_size), 1), most) * patch_size for side in (width, height))
    return next(sides), next(sides)


@register_encoder("siglip")
class Siglip(Encoder):
    """Patches of pictures to rows of features."""

    kind = "image"

    @dataclass(frozen=True, kw_only=True)
    class Config(TowerConfig):
        """A SigLIP tower; the defaults are So400m's with patches of 14."""

        max_side: int = 70
        """Patches along a side of the largest picture: positions are learned for its square."""
        shortest: int = 224
        """Pictures are brought to at least this many pixels on the shorter side."""
        eps: float = 1e-6
        """Added to the variance in the norms."""

        def __post_init__(self) -> None:
            super().__post_init__()
            self.check_positive("max_side")

    config: Siglip.Config

    def __init__(self, config: Siglip.Config, *, weights: bool = True) -> None:
        from transformers import SiglipVisionConfig
        from transformers.models.siglip.modeling_siglip import SiglipEncoder

        super().__init__(config)
        form = SiglipVisionConfig(
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            num_hidden_layers=config.num_layers,
            num_attention_heads=config.num_heads,
            patch_size=config.patch_size,
            image_size=config.patch_size * config.max_side,
            layer_norm_eps=config.eps,
            hidden_act=config.activation,
            attn_implementation="sdpa",
        )
        self.hidden_size = config.hidden_size
        self.patch_embedding = nn.Linear(3 * config.patch_size**2, config.hidden_size)
        self.position_embedding = nn.Embedding(config.max_side**2, config.hidden_size)
        self.layers = SiglipEncoder(form).layers
        self.post_layernorm = nn.LayerNorm(config.hidden_size, eps=config.eps)
        nn.init.normal_(self.position_embedding.weight, std=config.hidden_size**-0.5)

    def prepare(self, raws: Sequence[Any], **options: Any) -> dict[str, Tensor]:
        """Pictures to patches.

        Args:
            raws: B paths, PIL images, or uint8 arrays or tensors ``(H, W, 3)``; they are scaled, never cropped.
            options: none.

        Returns:
            ``patches (B, n, 3 P^2)`` in [-1, 1], each by row, column and channel; ``places (B, n)`` int64, row times
            ``max_side`` plus column; ``mask (B, n)`` bool, False at padding.

        Raises:
            EncoderError: if one is not a picture.
        """
        return self.pad([self.patches(picture) for picture in whole_pictures(raws)])

    def patches(self, picture: Image.Image) -> Tensor:
        """``(rows, columns, 3 P^2)`` of one picture in RGB, scaled to what the encoder takes."""
        size, config = self.config.patch_size, self.config
        fitted = fit_size(*picture.size, patch_size=size, shortest=config.shortest, longest=size * config.max_side)
        pixels = torch.from_numpy(np.array(picture.resize(fitted, Image.Resampling.BICUBIC), dtype=np.float32))
        return self.cells(pixels / 127.5 - 1)

    def cells(self, pixels: Tensor) -> Tensor:
        """``(rows, columns, 3 P^2)`` of a picture ``(H, W, 3)`` in [-1, 1] whose sides are multiples of P."""
        size = self.config.patch_size
        return pixels.unflatten(1, (-1, size)).unflatten(0, (-1, size)).transpose(1, 2).flatten(2)

    def pad(self, pictures: Sequence[Tensor]) -> dict[str, Tensor]:
        """Patches ``(rows, columns, 3 P^2)`` of each picture to one batch, as :meth:`prepare` gives it."""
        most = self.config.max_side
        for patches in pictures:
            if patches.ndim != 3 or max(patches.shape[:2]) > most:
                raise EncoderError(
                    f"patches must be (rows, columns, {3 * self.config.patch_size**2}) with at most {most} of each, "
                    f"got {tuple(patches.shape)}"
                )
        length = max(len(patches.flatten(0, 1)) for patches in pictures)
        rows, places, masks = [], [], []
        for patches in pictures:
            tall, wide, _ = patches.shape
            missing = length - tall * wide
            place = (torch.arange(tall).unsqueeze(1) * most + torch.arange(wide)).flatten()
            rows.append(F.pad(patches.flatten(0, 1), (0, 0, 0, missing)))
            places.append(F.pad(place, (0, missing)))
            masks.append(torch.arange(length) < tall * wide)
        return {"patches": torch.stack(rows), "places": torch.stack(places), "mask": torch.stack(masks)}

    def forward(self, inputs: Mapping[str, Tensor]) -> Features:
        """Patches to rows ``(B, n, C)``; pooled is their mean."""
        patches = inputs["patches"].to(self.device, self.dtype)
        places, mask = inputs["places"].to(self.device), inputs["mask"].to(self.device)
        x = self.patch_embedding(patches) + self.position_embedding(places)
        seen = None if bool(mask.all()) else mask[:, None, None, :].expand(-1, 1, mask.shape[1], -1)
        for layer in self.layers:
            x = layer(x, seen)
        rows = self.post_layernorm(x)
        real = mask.unsqueeze(-1).to(rows.dtype)
        pooled = (rows * real).sum(1) / real.sum(1)
        return Features(rows=rows, pooled=pooled, mask=None if seen is None else mask, places=places)


__all__ = ["Siglip", "fit_size"]

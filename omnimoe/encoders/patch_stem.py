"""Patches of a picture by one linear map, behind a learned row for the whole of it: what enters BEiT-3.

The map is the kernel of a convolution whose stride is its size. All that follows is the model's, positions too.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from omnimoe.config import ConfigError
from omnimoe.encoders.base import Encoder, EncoderError, Features, register_encoder
from omnimoe.encoders.raw import whole_pictures


@register_encoder("patch_stem")
class PatchStem(Encoder):
    """Pictures of one size to a class row and a row a patch.

    Source: https://arxiv.org/abs/2208.10442.
    """

    kind = "image"

    @dataclass(frozen=True, kw_only=True)
    class Config(Encoder.Config):
        """A map of patches."""

        hidden_size: int = 768
        """Width C."""
        image_size: int = 224
        """Side of a picture in pixels."""
        patch_size: int = 16
        """Side of a patch in pixels."""
        in_channels: int = 3
        """Channels of a pixel."""
        has_mask: bool = True
        """A learned row for patches that are hidden."""

        def __post_init__(self) -> None:
            super().__post_init__()
            if self.patch_size < 1 or self.image_size < self.patch_size or self.image_size % self.patch_size:
                raise ConfigError(f"patch_size {self.patch_size} must divide image_size {self.image_size}")
            if min(self.hidden_size, self.in_channels) < 1:
                raise ConfigError(
                    f"hidden_size and in_channels must be at least 1, got {self.hidden_size} and {self.in_channels}"
                )

        @property
        def num_rows(self) -> int:
            """The class row and the patches."""
            return 1 + (self.image_size // self.patch_size) ** 2

    config: PatchStem.Config

    def __init__(self, config: PatchStem.Config, *, weights: bool = True) -> None:
        super().__init__(config)
        self.hidden_size = config.hidden_size
        self.num_tokens = config.num_rows
        self.proj = nn.Linear(config.in_channels * config.patch_size**2, config.hidden_size)
        self.cls_token = nn.Parameter(torch.zeros(config.hidden_size))
        self.mask_token = nn.Parameter(torch.zeros(config.hidden_size)) if config.has_mask else None
        nn.init.normal_(self.cls_token, std=0.02)

    def prepare(self, raws: Sequence[Any], **options: Any) -> dict[str, Tensor]:
        """Pictures to patches.

        Args:
            raws: B paths, PIL images, or uint8 arrays or tensors ``(H, W, 3)``; they are brought to the one size, their
                shape not kept, as BEiT-3 does.
            options: none.

        Returns:
            ``patches (B, n, C_in P^2)`` in [-1, 1], each by row, column and channel.

        Raises:
            EncoderError: if one is not a picture.
        """
        side = self.config.image_size
        fitted = [picture.resize((side, side), Image.Resampling.BICUBIC) for picture in whole_pictures(raws)]
        pixels = torch.from_numpy(np.stack([np.array(picture, dtype=np.float32) for picture in fitted]))
        return self.patches((pixels / 127.5 - 1).permute(0, 3, 1, 2))

    def patches(self, pixels: Tensor) -> dict[str, Tensor]:
        """What :meth:`prepare` gives, of pixels ``(B, C_in, H, W)`` that are scaled already.

        Raises:
            EncoderError: if they are of another size.
        """
        side, size = self.config.image_size, self.config.patch_size
        if pixels.ndim != 4 or tuple(pixels.shape[1:]) != (self.config.in_channels, side, side):
            raise EncoderError(
                f"pixels must be (B, {self.config.in_channels}, {side}, {side}), got {tuple(pixels.shape)}; resize them"
            )
        cells = pixels.unflatten(3, (-1, size)).unflatten(2, (-1, size))  # (B, C, rows, P, columns, P)
        return {"patches": cells.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)}

    def forward(self, inputs: Mapping[str, Tensor]) -> Features:
        """Patches to rows ``(B, 1 + n, C)``, the class row first; pooled is that row.

        Args:
            inputs: as :meth:`prepare` gives them; with ``masked (B, n)`` bool the learned mask stands in the place of
                the patches where it is True.
        """
        rows = self.proj(inputs["patches"].to(self.device, self.dtype))
        masked = inputs.get("masked")
        if masked is not None and self.mask_token is None:
            raise EncoderError("this map of patches has no row for hidden ones; drop masked, or set has_mask=True")
        if masked is None and self.mask_token is not None:
            # a mask that hides nothing takes part too: its gradient is zero, not missing
            rows = rows + 0 * self.mask_token
        elif masked is not None and self.mask_token is not None:
            rows = torch.where(masked.to(self.device).bool().unsqueeze(2), self.mask_token, rows)
        whole = self.cls_token.expand(len(rows), 1, -1)
        return Features(rows=torch.cat((whole, rows), dim=1), pooled=whole.squeeze(1))


__all__ = ["PatchStem"]

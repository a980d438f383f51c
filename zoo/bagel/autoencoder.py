"""The picture autoencoder that BAGEL draws with: FLUX's, in ``ae.safetensors`` beside the model.

The network is diffusers' ``AutoencoderKL``; the file names its tensors as latent diffusion first did, and its attention
has kernels of 1 x 1 where diffusers has matrices. A latent of 16 channels at an eighth of the resolution is cut into
patches of 2 x 2, each by row, column and channel, so a row of the model stands for 16 x 16 pixels.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from omnimoe import CheckpointError
from omnimoe.checkpoint.header import read_header
from omnimoe.tokenizers.raster import from_signed, to_signed

FILE = "ae.safetensors"
CELL, PATCH, CHANNELS = 8, 2, 16
PIXELS = CELL * PATCH
"""Side of the square that a row of the model stands for."""
FORM: dict[str, Any] = {
    "in_channels": 3,
    "out_channels": 3,
    "latent_channels": CHANNELS,
    "block_out_channels": (128, 256, 512, 512),
    "layers_per_block": 2,
    "norm_num_groups": 32,
    "use_quant_conv": False,
    "use_post_quant_conv": False,
    "scaling_factor": 0.3611,
    "shift_factor": 0.1159,
    "sample_size": 1024,
}
"""diffusers' config of it."""

_PARTS = (
    (r"\.mid\.block_1\.", ".mid_block.resnets.0."),
    (r"\.mid\.block_2\.", ".mid_block.resnets.1."),
    (r"\.mid\.attn_1\.norm\.", ".mid_block.attentions.0.group_norm."),
    (r"\.mid\.attn_1\.([qkv])\.", r".mid_block.attentions.0.to_\1."),
    (r"\.mid\.attn_1\.proj_out\.", ".mid_block.attentions.0.to_out.0."),
    (r"\.nin_shortcut\.", ".conv_shortcut."),
    (r"\.norm_out\.", ".conv_norm_out."),
)


def diffusers_name(name: str, levels: int = 4) -> str:
    """The name that diffusers has for a tensor of the file.

    Example:
        >>> diffusers_name("decoder.up.0.block.1.conv1.weight")
        'decoder.up_blocks.3.resnets.1.conv1.weight'
    """
    for pattern, replacement in _PARTS:
        name = re.sub(pattern, replacement, name)
    name = re.sub(r"\.down\.(\d+)\.block\.", r".down_blocks.\1.resnets.", name)
    name = re.sub(r"\.down\.(\d+)\.downsample\.", r".down_blocks.\1.downsamplers.0.", name)

    def turned(match: re.Match[str]) -> str:
        part = "resnets." if match[2] == "block." else "upsamplers.0."
        return f".up_blocks.{levels - 1 - int(match[1])}.{part}"

    return re.sub(r"\.up\.(\d+)\.(block\.|upsample\.)", turned, name)


class BagelAutoencoder(nn.Module):
    """Pictures to patches of latents and back.

    Args:
        form: diffusers' config, where another than the published one is wanted.
    """

    def __init__(self, form: dict[str, Any] | None = None) -> None:
        super().__init__()
        try:
            from diffusers import AutoencoderKL
        except ImportError as error:
            raise ImportError(
                f"BAGEL's autoencoder needs diffusers ({error}): pip install 'omnimoe[diffusers]'"
            ) from error
        self.form = {**FORM, **(form or {})}
        levels = len(self.form["block_out_channels"])
        self.form |= {"down_block_types": ("DownEncoderBlock2D",) * levels}
        self.form |= {"up_block_types": ("UpDecoderBlock2D",) * levels}
        network: Any = AutoencoderKL(**self.form)
        self.network = network.eval().requires_grad_(False)

    @classmethod
    def from_folder(cls, folder: Path) -> BagelAutoencoder:
        """The autoencoder of a checkpoint, as wide and deep as the file says.

        Args:
            folder: holds ``ae.safetensors``.

        Raises:
            CheckpointError: if the file is missing, damaged, or of another network.
        """
        file = folder / FILE
        if not file.is_file():
            raise CheckpointError(f"{folder} has no {FILE}, without which no picture can be drawn or edited")
        widths = {name: held.shape[0] for name, held in read_header(file).items() if len(held.shape) == 4}
        levels = [widths.get(f"encoder.down.{level}.block.0.conv1.weight") for level in range(8)]
        found = tuple(width for width in levels if width is not None)
        made = cls({"block_out_channels": found} if found else None)
        made.load_published(load_file(file), str(file))
        return made

    def load_published(self, held: dict[str, Tensor], what: str = FILE) -> None:
        """Fills the network with tensors under their published names.

        Raises:
            CheckpointError: if one is missing, left over, or of another shape.
        """
        own = self.network.state_dict()
        named = {diffusers_name(name, len(self.form["block_out_channels"])): name for name in held}
        missing, unknown = sorted(set(own) - set(named)), sorted(set(named) - set(own))
        if missing or unknown:
            told = f"lacks {missing[0]}" if missing else f"holds {named[unknown[0]]}, which the network does not have"
            raise CheckpointError(f"{what} is no autoencoder of BAGEL: it {told}")
        for name, published in named.items():
            tensor = held[published]
            if tensor.numel() != own[name].numel() or (tensor.shape != own[name].shape and tensor.shape[2:] != (1, 1)):
                raise CheckpointError(
                    f"{published} of {what} is {tuple(tensor.shape)}, and the network has {tuple(own[name].shape)}"
                )
            own[name].copy_(tensor.view_as(own[name]))

    @torch.no_grad()
    def encode(self, pictures: Sequence[np.ndarray], *, generator: torch.Generator | None = None) -> list[Tensor]:
        """Pictures to rows.

        Args:
            pictures: ``(H, W, 3)`` uint8 each, both sides multiples of 16.
            generator: draws from the posterior, as the original does; its mean where None.

        Returns:
            ``(H / 16, W / 16, 64)`` float32 for each, on the CPU.

        Raises:
            ValueError: if a side is no multiple of 16.
        """
        found = []
        for picture in pictures:
            if picture.ndim != 3 or picture.shape[0] % PIXELS or picture.shape[1] % PIXELS:
                raise ValueError(f"a picture must be (H, W, 3) with multiples of {PIXELS}, got {picture.shape}")
            weight = self.network.encoder.conv_in.weight
            posterior = self.network.encode(to_signed(picture[None]).to(weight)).latent_dist
            latent = posterior.mode() if generator is None else posterior.sample(generator)
            latent = (latent - self.form["shift_factor"]) * self.form["scaling_factor"]
            cells = latent[0].unflatten(2, (-1, PATCH)).unflatten(1, (-1, PATCH))  # (C, rows, p, columns, q)
            found.append(cells.permute(1, 3, 2, 4, 0).flatten(2).float().cpu())
        return found

    @torch.no_grad()
    def decode(self, rows: Sequence[Tensor]) -> list[np.ndarray]:
        """Rows ``(rows, columns, 64)`` of each picture to ``(H, W, 3)`` uint8."""
        made = []
        for picture in rows:
            weight = self.network.decoder.conv_in.weight
            cells = picture.to(weight).unflatten(2, (PATCH, PATCH, -1))  # (rows, columns, p, q, C)
            latent = cells.permute(4, 0, 2, 1, 3).flatten(3).flatten(1, 2)
            latent = latent / self.form["scaling_factor"] + self.form["shift_factor"]
            made.append(from_signed(self.network.decode(latent[None]).sample)[0])
        return made


__all__ = ["FILE", "FORM", "PIXELS", "BagelAutoencoder", "diffusers_name"]

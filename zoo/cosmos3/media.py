"""Pictures and sounds to latents of Cosmos3 and back, by the networks of diffusers that are published beside the model.

Latents are brought to zero mean and unit variance, channel by channel, by numbers in the config of the autoencoder.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from omnimoe import CheckpointError
from omnimoe.tokenizers.raster import from_signed, to_signed

CELL = 16
"""Side in pixels of a latent cell."""
_KINDS = {
    "vae": "AutoencoderKLWan",
    "scheduler": "UniPCMultistepScheduler",
    "sound_tokenizer": "Cosmos3AVAEAudioTokenizer",
}
"""Folders of a checkpoint and diffusers' classes of what is in them."""


def read_part(folder: Path, name: str, device: torch.device | str = "cpu") -> Any:
    """A part of a checkpoint as diffusers reads it, networks in float32; None where the folder has no such part.

    Args:
        folder: of the checkpoint.
        name: ``"vae"``, ``"scheduler"`` or ``"sound_tokenizer"``.
        device: where to put it.

    Raises:
        CheckpointError: if it cannot be read.
        ImportError: without diffusers.
    """
    place, kind = folder / name, _KINDS[name]
    if not any(place.glob("*config.json")):
        return None
    try:
        import diffusers
    except ImportError as error:
        raise ImportError(f"{place} is read by diffusers ({error}): pip install 'omnimoe[diffusers]'") from error
    options = {} if name == "scheduler" else {"use_safetensors": True}
    try:
        made = getattr(diffusers, kind).from_pretrained(place, **options)
    except (OSError, ValueError, RuntimeError, AttributeError) as error:
        raise CheckpointError(f"{place} cannot be read as diffusers' {kind}: {error}") from error
    return made if name == "scheduler" else made.float().eval().requires_grad_(False).to(device)


@torch.no_grad()
def encode_picture(network: Any, picture: Image.Image, size: tuple[int, int]) -> Tensor:
    """The latent of a picture that a clip begins with.

    Args:
        network: diffusers' ``AutoencoderKLWan``.
        picture: scaled to cover the size, and cut.
        size: height and width in pixels.

    Returns:
        ``(C, 1, H / 16, W / 16)`` float32 on the CPU.
    """
    tall, wide = size
    scale = max(tall / picture.height, wide / picture.width)
    full = (int(np.ceil(scale * picture.height)), int(np.ceil(scale * picture.width)))
    pixels = (to_signed(np.asarray(picture)[None]) + 1) * 127.5
    pixels = F.interpolate(pixels, size=full, mode="bilinear", antialias=True)
    top, left = round((full[0] - tall) / 2), round((full[1] - wide) / 2)
    pixels = pixels[:, :, top : top + tall, left : left + wide].round().clamp(0, 255) / 127.5 - 1
    latent = network.encode(pixels.unsqueeze(2).to(next(network.parameters()))).latent_dist.mode()[0]
    mean, std = _scale(network, latent)
    return ((latent - mean) / std).float().cpu()


@torch.no_grad()
def decode_pictures(network: Any, latent: Tensor) -> np.ndarray:
    """A latent clip ``(C, T, H, W)`` to frames ``(4 T - 3, 16 H, 16 W, 3)`` uint8."""
    latent = latent.to(next(network.parameters()))
    mean, std = _scale(network, latent)
    return from_signed(network.decode((latent * std + mean)[None]).sample[0].transpose(0, 1))


@torch.no_grad()
def decode_sound(network: Any, rows: Tensor) -> Tensor:
    """Latent moments ``(n, C)`` to a sound ``(channels, samples)`` float32 on the CPU."""
    return network.decode(rows.T[None].to(next(network.parameters())))[0].float().cpu()


def sound_length(network: Any, seconds: float) -> int:
    """Latent moments of a sound."""
    hop = network.config.hop_size or int(np.prod(network.config.dec_strides))
    return -(-int(seconds * network.config.sampling_rate) // hop)


def _scale(network: Any, latent: Tensor) -> tuple[Tensor, Tensor]:
    held = (network.config.latents_mean, network.config.latents_std)
    mean, std = (torch.tensor(part).to(latent).view(-1, 1, 1, 1) for part in held)
    return mean, std


__all__ = ["CELL", "decode_pictures", "decode_sound", "encode_picture", "read_part", "sound_length"]

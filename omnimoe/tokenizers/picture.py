"""Pictures to an 8 x 8 grid of discrete codes and back: 64 tokens of a 64 x 64 RGB picture.

Convolutions see edges; a few attention blocks on the 8 x 8 grid let the 64 codes share the work, so that a flat
background costs little and a face gets the detail. Codes are FSQ (:mod:`omnimoe.tokenizers.fsq`), so none collapse.
"""

from __future__ import annotations

import dataclasses
from os import PathLike, fspath
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, UnidentifiedImageError
from torch import Tensor, nn

from omnimoe.config import Config, ConfigError
from omnimoe.config import Config as ConfigBase
from omnimoe.tokenizers.base import TokenizerError, register_tokenizer
from omnimoe.tokenizers.codec import CodecTokenizer
from omnimoe.tokenizers.fsq import FSQ

_PATCH = 8
_CHUNK = 256


class ResidualBlock(nn.Module):
    """``x + conv(silu(conv(silu(x))))``, 3 x 3 on ``(B, C, H, W)``; without norms, which hide absolute colour."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv_in = nn.Conv2d(channels, channels, 3, padding=1)
        self.conv_out = nn.Conv2d(channels, channels, 3, padding=1)
        # Starts as the identity, which is what lets a network without norms train at a high rate.
        for parameter in self.conv_out.parameters():
            nn.init.zeros_(parameter)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv_out(F.silu(self.conv_in(F.silu(x))))


class GridBlock(nn.Module):
    """A pre-norm transformer block over the cells of the grid, ``(B, n, D)`` to the same."""

    def __init__(self, hidden_size: int, num_heads: int, mlp_ratio: int = 2) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.norm_attention = nn.LayerNorm(hidden_size)
        self.qkv = nn.Linear(hidden_size, 3 * hidden_size)
        self.o_proj = nn.Linear(hidden_size, hidden_size)
        self.norm_mlp = nn.LayerNorm(hidden_size)
        self.mlp = nn.Sequential(
            nn.Linear(hidden_size, mlp_ratio * hidden_size), nn.GELU(), nn.Linear(mlp_ratio * hidden_size, hidden_size)
        )
        for layer in (self.o_proj, self.mlp[2]):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        qkv = (
            self.qkv(self.norm_attention(x))
            .view(batch, length, 3, self.num_heads, width // self.num_heads)
            .permute(2, 0, 3, 1, 4)
        )
        q, k, v = qkv.unbind(0)
        # Written out: for 64 cells on a CPU the fused kernel's backward costs twice as much.
        weights = (q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5).softmax(-1).to(v.dtype)
        mixed = weights @ v
        x = x + self.o_proj(mixed.transpose(1, 2).reshape(batch, length, width))
        return x + self.mlp(self.norm_mlp(x))


class PictureAutoencoder(nn.Module):
    """The network: ``encode`` to ids, ``decode`` from codes, ``forward`` through both for training.

    Args:
        image_size: height and width of a picture, a multiple of 8.
        hidden_size: width on the grid; two fifths of it at twice, a fifth at four times the grid's resolution.
        encoder_blocks: attention blocks on the grid in the encoder.
        decoder_blocks: attention blocks on the grid in the decoder.
        num_heads: attention heads of each.
        levels: FSQ levels.
    """

    def __init__(
        self,
        *,
        image_size: int,
        hidden_size: int,
        encoder_blocks: int,
        decoder_blocks: int,
        num_heads: int,
        levels: tuple[int, ...],
    ) -> None:
        super().__init__()
        self.side = image_size // _PATCH
        middle, fine = 2 * hidden_size // 5, hidden_size // 5
        self.fsq = FSQ(levels)
        self.encoder_stem = nn.Sequential(
            nn.PixelUnshuffle(4),
            nn.Conv2d(48, middle, 3, padding=1),
            ResidualBlock(middle),
            nn.SiLU(),
            nn.Conv2d(middle, hidden_size, 2, stride=2),
        )
        self.encoder_positions = nn.Parameter(torch.zeros(self.side**2, hidden_size))
        self.encoder_blocks = nn.Sequential(*(GridBlock(hidden_size, num_heads) for _ in range(encoder_blocks)))
        self.to_codes = nn.Sequential(nn.LayerNorm(hidden_size), nn.Linear(hidden_size, len(levels)))

        self.from_codes = nn.Linear(len(levels), hidden_size)
        self.decoder_positions = nn.Parameter(torch.zeros(self.side**2, hidden_size))
        self.decoder_blocks = nn.Sequential(*(GridBlock(hidden_size, num_heads) for _ in range(decoder_blocks)))
        self.decoder_head = nn.Sequential(
            nn.Conv2d(hidden_size, 4 * middle, 1),
            nn.PixelShuffle(2),
            ResidualBlock(middle),
            nn.Conv2d(middle, 4 * fine, 3, padding=1),
            nn.PixelShuffle(2),
            ResidualBlock(fine),
            nn.SiLU(),
            nn.Conv2d(fine, 12, 3, padding=1),
            nn.PixelShuffle(2),
        )
        for positions in (self.encoder_positions, self.decoder_positions):
            nn.init.normal_(positions, std=0.02)

    def encode(self, pictures: Tensor) -> tuple[Tensor, Tensor]:
        """Pictures ``(B, 3, S, S)`` in ``[-1, 1]`` to codes ``(B, n, d)`` float32 and ids ``(B, n)`` int64."""
        grid = self.encoder_stem(pictures).flatten(2).transpose(1, 2)
        return self.fsq(self.to_codes(self.encoder_blocks(grid + self.encoder_positions)))

    def decode(self, codes: Tensor) -> Tensor:
        """Codes ``(B, n, d)`` to pictures ``(B, 3, S, S)``, about ``[-1, 1]``, not clipped."""
        grid = self.decoder_blocks(self.from_codes(codes) + self.decoder_positions)
        return self.decoder_head(grid.transpose(1, 2).unflatten(2, (self.side, self.side)))

    def forward(self, pictures: Tensor) -> tuple[Tensor, Tensor]:
        """Pictures to reconstructions of the same shape, and ids ``(B, n)``."""
        codes, ids = self.encode(pictures)
        return self.decode(codes), ids


@register_tokenizer("picture")
class PictureTokenizer(CodecTokenizer):
    """64 x 64 RGB to 64 ids of 1,000, row by row from the top left, and back.

    Example:
        >>> tokenizer = PictureTokenizer.from_pretrained()
        >>> ids = tokenizer.encode(np.full((64, 64, 3), 255, np.uint8))
        >>> ids.shape, tokenizer.decode(ids).shape
        (torch.Size([64]), (64, 64, 3))
    """

    shipped = "picture_64.safetensors"
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
        levels: tuple[int, ...] = (8, 5, 5, 5)
        """FSQ levels; their product is the vocabulary."""

    def __init__(self, config: Config) -> None:
        if config.image_size < _PATCH or config.image_size % _PATCH:
            raise ConfigError(f"image_size must be a multiple of {_PATCH}, got {config.image_size}")
        if config.hidden_size % 5 or config.hidden_size % config.num_heads:
            raise ConfigError(
                f"hidden_size must be a multiple of 5 and of num_heads ({config.num_heads}), got {config.hidden_size}"
            )
        fields = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
        super().__init__(config, PictureAutoencoder(**fields))
        self.image_size = config.image_size
        self.vocab_size = self.network.fsq.num_codes
        self.grid = (self.network.side, self.network.side)
        self.num_tokens = self.network.side**2

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
        if isinstance(raws, str | PathLike | Image.Image):
            raise TokenizerError("encode_batch takes a sequence of pictures; use encode for one")
        pictures = [to_square(raw, self.image_size) for raw in raws]
        ids = [
            self.network.encode(to_signed(np.stack(pictures[start : start + _CHUNK])).to(self.device))[1].cpu()
            for start in range(0, len(pictures), _CHUNK)
        ]
        return torch.cat(ids) if ids else torch.empty(0, self.network.side**2, dtype=torch.long)

    @torch.no_grad()
    def decode_batch(self, ids: Any) -> np.ndarray:
        """Ids ``(B, 64)`` to pictures ``(B, 64, 64, 3)`` uint8."""
        ids = self.check_ids(ids)
        if ids.ndim != 2:
            raise TokenizerError(
                f"decode_batch takes ids (B, {self.num_tokens}), not {tuple(ids.shape)}; use decode for one"
            )
        codes = self.network.fsq.ids_to_codes(ids.to(self.device))
        pictures = [from_signed(self.network.decode(part)) for part in codes.split(_CHUNK)]
        return np.concatenate(pictures)


def to_square(raw: Any, size: int) -> np.ndarray:
    """A picture of any kind and size on a white square: ``(size, size, 3)`` uint8.

    Args:
        raw: what :meth:`PictureTokenizer.encode` takes.
        size: side of the result in pixels.

    Raises:
        TokenizerError: if ``raw`` is not a picture.
    """
    if isinstance(raw, torch.Tensor):
        raw = raw.detach().cpu().numpy()
    if isinstance(raw, np.ndarray):
        if raw.dtype == np.uint8 and raw.shape == (size, size, 3):
            return raw
        picture = _from_array(raw)
    elif isinstance(raw, Image.Image):
        picture = raw
    elif isinstance(raw, str | PathLike):
        picture = _from_file(Path(fspath(raw)))
    else:
        raise TokenizerError(
            f"a picture is a path, a PIL image or a uint8 array (H, W, 3), not {type(raw).__name__}: {str(raw)[:60]!r}"
        )
    try:
        picture = picture.convert("RGBA")
    except (OSError, SyntaxError, ValueError) as error:
        raise TokenizerError(f"the picture cannot be read to its end: {error}; is the file complete?") from error
    side = max(picture.size)
    if min(picture.size) < 1:
        raise TokenizerError(f"a picture needs at least one pixel, got {picture.width} x {picture.height}")
    square = Image.new("RGBA", (side, side), "white")
    square.alpha_composite(picture, ((side - picture.width) // 2, (side - picture.height) // 2))
    square = square.convert("RGB")
    return np.asarray(square if side == size else square.resize((size, size), Image.Resampling.BICUBIC), np.uint8)


def to_signed(pictures: np.ndarray) -> Tensor:
    """``(B, H, W, 3)`` uint8 to ``(B, 3, H, W)`` float32 in ``[-1, 1]``."""
    return torch.from_numpy(np.array(pictures)).permute(0, 3, 1, 2).float() / 127.5 - 1


def from_signed(pictures: Tensor) -> np.ndarray:
    """``(B, 3, H, W)`` to ``(B, H, W, 3)`` uint8; the inverse of :func:`to_signed`, clipping."""
    scaled = (pictures.float().clamp(-1, 1) + 1) * 127.5
    return scaled.round().byte().permute(0, 2, 3, 1).cpu().numpy()


def _from_array(raw: np.ndarray) -> Image.Image:
    channels_fit = raw.ndim == 2 or (raw.ndim == 3 and raw.shape[2] in (3, 4))
    if raw.dtype != np.uint8 or not channels_fit:
        raise TokenizerError(
            f"an array of a picture is uint8 of shape (H, W), (H, W, 3) or (H, W, 4), not {raw.dtype} {raw.shape}; "
            "scale floats to 0..255 and move channels last"
        )
    if not raw.size:
        raise TokenizerError(f"a picture needs at least one pixel, got an array of shape {raw.shape}")
    return Image.fromarray(np.ascontiguousarray(raw))


def _from_file(path: Path) -> Image.Image:
    try:
        picture = Image.open(path)
        picture.load()
    except FileNotFoundError:
        raise TokenizerError(f"no picture at {path}") from None
    except UnidentifiedImageError:
        raise TokenizerError(
            f"{path} is not a picture in a format that Pillow knows (png, jpeg, webp, gif, ...)"
        ) from None
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise TokenizerError(f"the picture {path} cannot be read: {error}") from error
    return picture

"""A picture autoencoder with a codebook, as VQGAN drew it and Chameleon, among others, took it over.

Convolutions bring a picture down to a grid, each cell of which is replaced by the nearest entry of a codebook; the
number of the entry is the code. The way back is optional: some models are published without it. Parts are called as in
the checkpoints of that line.

Source: https://arxiv.org/abs/2012.09841; with these sizes, https://arxiv.org/abs/2203.13131.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn

from omnimoe.config import Config as ConfigBase
from omnimoe.config import ConfigError, Configurable

_GROUPS = 32
_MOST_BLOCKS, _WIDEST = 32, 2**15
"""Past those of any network, by which a config that was damaged or made to hurt is told."""


def _norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(_GROUPS, channels, eps=1e-6)


class ResidualBlock(nn.Module):
    """Two convolutions beside a shortcut; ``(B, C, h, w)`` to another C."""

    def __init__(self, width_in: int, width_out: int) -> None:
        super().__init__()
        self.norm1 = _norm(width_in)
        self.conv1 = nn.Conv2d(width_in, width_out, 3, padding=1)
        self.norm2 = _norm(width_out)
        self.conv2 = nn.Conv2d(width_out, width_out, 3, padding=1)
        self.nin_shortcut = None if width_in == width_out else nn.Conv2d(width_in, width_out, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv1(F.silu(self.norm1(x)))
        y = self.conv2(F.silu(self.norm2(y)))
        return y + (x if self.nin_shortcut is None else self.nin_shortcut(x))


class CellAttention(nn.Module):
    """One head over all cells of the grid, beside a shortcut."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = _norm(width)
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(width, width, 1) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        normal = self.norm(x)
        query, key, value = (site(normal).flatten(2).transpose(1, 2) for site in (self.q, self.k, self.v))
        mixed = F.scaled_dot_product_attention(query, key, value)  # (B, h w, C)
        return x + self.proj_out(mixed.transpose(1, 2).unflatten(2, x.shape[2:]))


class Halve(nn.Module):
    """``(B, C, h, w)`` to half of both sides."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Double(nn.Module):
    """``(B, C, h, w)`` to twice both sides."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class Level(nn.Module):
    """The blocks at one resolution, and the step to the next."""

    def __init__(self, widths: list[int], has_attention: bool, step: tuple[str, type[nn.Module]] | None) -> None:
        super().__init__()
        self.block = nn.ModuleList(itertools.starmap(ResidualBlock, itertools.pairwise(widths)))
        self.attn = nn.ModuleList(CellAttention(width) for width in widths[1:] if has_attention)
        self.step = None if step is None else step[0]
        if step is not None:
            self.add_module(step[0], step[1](widths[-1]))

    def forward(self, x: Tensor) -> Tensor:
        for index, block in enumerate(self.block):
            x = block(x)
            if len(self.attn):
                x = self.attn[index](x)
        return x if self.step is None else self.get_submodule(self.step)(x)


class Middle(nn.Module):
    """What lies between the two halves, at the lowest resolution."""

    def __init__(self, width: int, has_attention: bool) -> None:
        super().__init__()
        self.block_1 = ResidualBlock(width, width)
        self.attn_1 = CellAttention(width) if has_attention else nn.Identity()
        self.block_2 = ResidualBlock(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.block_2(self.attn_1(self.block_1(x)))


class Codebook(nn.Module):
    """Vectors to the number of the nearest entry, and numbers to entries."""

    def __init__(self, num_codes: int, width: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(num_codes, width)

    def forward(self, x: Tensor) -> Tensor:
        """``(..., C)`` to ``(...)`` int64."""
        entries = self.embedding.weight
        rows = x.flatten(0, -2)
        distance = rows.square().sum(1, keepdim=True) + entries.square().sum(1) - 2 * rows @ entries.T
        return distance.argmin(1).view(x.shape[:-1])


class VqAutoencoder(nn.Module, Configurable):
    """Pictures to a grid of codes and, with a decoder, back."""

    @dataclass(frozen=True, kw_only=True)
    class Config(ConfigBase):
        """The network; the defaults are Chameleon's."""

        image_size: int = 512
        """Height and width of a picture in pixels."""
        in_channels: int = 3
        """Of a picture."""
        channels: int = 128
        """Width at the full resolution, a multiple of 32."""
        multipliers: tuple[int, ...] = (1, 1, 2, 2, 4)
        """Width of each level by that; every level but the last halves the resolution."""
        num_blocks: int = 2
        """Residual blocks of a level on the way down; one more on the way up."""
        attention_sizes: tuple[int, ...] = ()
        """Sides of the grid at which attention follows every block."""
        middle_attention: bool = True
        """Attention at the lowest resolution."""
        latent_channels: int = 256
        """Width of what the encoder gives."""
        code_channels: int = 256
        """Width of an entry of the codebook."""
        num_codes: int = 8192
        """Entries of the codebook."""
        has_decoder: bool = True
        """Whether there is a way back."""

        def __post_init__(self) -> None:
            super().__post_init__()
            sizes = ("image_size", "in_channels", "num_blocks", "latent_channels", "code_channels", "num_codes")
            self.check_positive(*sizes)
            for name, value, most in (
                ("num_blocks", self.num_blocks, _MOST_BLOCKS),
                ("the number of multipliers", len(self.multipliers), _MOST_BLOCKS),
                ("channels times the largest multiplier", self.channels * max(self.multipliers, default=1), _WIDEST),
                ("latent_channels", self.latent_channels, _WIDEST),
                ("code_channels", self.code_channels, _WIDEST),
            ):
                if value > most:
                    raise ConfigError(f"{name} must be at most {most}, got {value}")
            if self.channels < _GROUPS or self.channels % _GROUPS:
                raise ConfigError(f"channels must be a multiple of {_GROUPS}, got {self.channels}")
            if not self.multipliers or min(self.multipliers) < 1:
                raise ConfigError(f"multipliers must be one or more numbers from 1, got {self.multipliers}")
            if self.image_size % self.cell_size:
                raise ConfigError(
                    f"image_size must be a multiple of {self.cell_size}, which {len(self.multipliers)} levels make a "
                    f"cell, got {self.image_size}"
                )

        @property
        def cell_size(self) -> int:
            """Side in pixels of the square that a code stands for."""
            return 2 ** (len(self.multipliers) - 1)

        @property
        def side(self) -> int:
            """Cells along a side of the grid."""
            return self.image_size // self.cell_size

    def __init__(self, config: VqAutoencoder.Config) -> None:
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.quant_conv = nn.Conv2d(config.latent_channels, config.code_channels, 1)
        self.quantize = Codebook(config.num_codes, config.code_channels)
        self.post_quant_conv = nn.Conv2d(config.code_channels, config.latent_channels, 1)
        self.decoder = Decoder(config) if config.has_decoder else None

    def encode(self, pixels: Tensor) -> Tensor:
        """Pictures to codes.

        Args:
            pixels: ``(B, 3, S, S)`` in [-1, 1]; S may be any multiple of ``cell_size``.

        Returns:
            ``(B, n)`` int64, row by row from the top left.
        """
        cells = self.quant_conv(self.encoder(pixels.to(self.quant_conv.weight)))
        return self.quantize(cells.movedim(1, -1)).flatten(1)

    def decode(self, codes: Tensor) -> Tensor:
        """Codes to pictures.

        Args:
            codes: ``(B, n)`` int64, of square pictures.

        Returns:
            ``(B, 3, S, S)``, nearly in [-1, 1].

        Raises:
            ValueError: if there is no decoder.
        """
        if self.decoder is None:
            raise ValueError("this autoencoder was published without its decoder, so codes cannot be made a picture")
        side = round(codes.shape[1] ** 0.5)
        cells = self.quantize.embedding(codes).unflatten(1, (side, -1)).movedim(-1, 1)
        return self.decoder(self.post_quant_conv(cells))


class Encoder(nn.Module):
    """``(B, 3, S, S)`` to ``(B, C, s, s)``."""

    def __init__(self, config: VqAutoencoder.Config) -> None:
        super().__init__()
        widths = [config.channels * times for times in (1, *config.multipliers)]
        last = len(config.multipliers) - 1
        self.conv_in = nn.Conv2d(config.in_channels, widths[0], 3, padding=1)
        self.down = nn.ModuleList(
            Level(
                [widths[level], *[widths[level + 1]] * config.num_blocks],
                config.image_size // 2**level in config.attention_sizes,
                None if level == last else ("downsample", Halve),
            )
            for level in range(last + 1)
        )
        self.mid = Middle(widths[-1], config.middle_attention)
        self.norm_out = _norm(widths[-1])
        self.conv_out = nn.Conv2d(widths[-1], config.latent_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)
        for level in self.down:
            x = level(x)
        return self.conv_out(F.silu(self.norm_out(self.mid(x))))


class Decoder(nn.Module):
    """``(B, C, s, s)`` to ``(B, 3, S, S)``."""

    def __init__(self, config: VqAutoencoder.Config) -> None:
        super().__init__()
        widths = [config.channels * times for times in config.multipliers]
        above = [*widths[1:], widths[-1]]  # what comes into a level
        self.conv_in = nn.Conv2d(config.latent_channels, widths[-1], 3, padding=1)
        self.mid = Middle(widths[-1], config.middle_attention)
        self.up = nn.ModuleList(
            Level(
                [above[level], *[width] * (config.num_blocks + 1)],
                config.image_size // 2**level in config.attention_sizes,
                None if level == 0 else ("upsample", Double),
            )
            for level, width in enumerate(widths)
        )
        self.norm_out = _norm(widths[0])
        self.conv_out = nn.Conv2d(widths[0], config.in_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.mid(self.conv_in(x))
        for level in reversed(self.up):
            x = level(x)
        return self.conv_out(F.silu(self.norm_out(x)))


__all__ = ["VqAutoencoder"]

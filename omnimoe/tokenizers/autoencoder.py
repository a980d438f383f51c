"""The network of the picture tokenizers: pictures to a grid of codes or latents, and back.

Convolutions see edges; attention blocks on the grid let its cells share the work, so that a flat background costs
little and a face gets the detail. What lies between encoder and decoder is a choice: FSQ for ids, a Gaussian for
vectors.
"""

from __future__ import annotations

from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

PATCH = 8
"""Pixels along a side of the square that one cell of the grid stands for."""


class Bottleneck(Protocol):
    """What lies between encoder and decoder: :class:`~omnimoe.tokenizers.fsq.FSQ` or :class:`GaussianLatent`.

    Called with ``z (..., in_channels)``, it gives codes ``(..., channels)`` and ids ``(...)`` or a divergence ``()``.
    """

    in_channels: int
    channels: int

    def __call__(self, z: Tensor) -> tuple[Tensor, Tensor]: ...


class GaussianLatent(nn.Module):
    """A Gaussian for each cell, as in a variational autoencoder: sampled in training, its mean in use.

    Source: https://arxiv.org/abs/1312.6114, as the latents of https://arxiv.org/abs/2112.10752.

    Args:
        channels: width C of a latent.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.channels = channels
        self.in_channels = 2 * channels

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Draws.

        Args:
            z: ``(..., 2C)``, means and log variances.

        Returns:
            latents ``(..., C)`` float32, and the mean divergence from the standard normal, ``()``, in nats a channel.
        """
        mean, log_variance = z.float().chunk(2, dim=-1)
        log_variance = log_variance.clamp(-20, 10)
        divergence = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).mean()
        if not self.training:
            return mean, divergence
        return mean + torch.randn_like(mean) * (0.5 * log_variance).exp(), divergence


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
    """``encode`` to codes, ``decode`` from codes, ``forward`` through both for training.

    Args:
        image_size: height and width of a picture, a multiple of 8.
        hidden_size: width on the grid; two fifths of it at twice, a fifth at four times the grid's resolution.
        encoder_blocks: attention blocks on the grid in the encoder.
        decoder_blocks: attention blocks on the grid in the decoder.
        num_heads: attention heads of each.
        bottleneck: what makes codes of the encoder's output.
    """

    def __init__(
        self,
        *,
        image_size: int,
        hidden_size: int,
        encoder_blocks: int,
        decoder_blocks: int,
        num_heads: int,
        bottleneck: Bottleneck,
    ) -> None:
        super().__init__()
        self.side = image_size // PATCH
        middle, fine = 2 * hidden_size // 5, hidden_size // 5
        self.bottleneck = bottleneck
        self.encoder_stem = nn.Sequential(
            nn.PixelUnshuffle(4),
            nn.Conv2d(48, middle, 3, padding=1),
            ResidualBlock(middle),
            nn.SiLU(),
            nn.Conv2d(middle, hidden_size, 2, stride=2),
        )
        self.encoder_positions = nn.Parameter(torch.zeros(self.side**2, hidden_size))
        self.encoder_blocks = nn.Sequential(*(GridBlock(hidden_size, num_heads) for _ in range(encoder_blocks)))
        self.to_codes = nn.Sequential(nn.LayerNorm(hidden_size), nn.Linear(hidden_size, bottleneck.in_channels))

        self.from_codes = nn.Linear(bottleneck.channels, hidden_size)
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
        """Pictures ``(B, 3, S, S)`` in ``[-1, 1]`` to codes ``(B, n, d)`` float32 and ids or divergence."""
        grid = self.encoder_stem(pictures).flatten(2).transpose(1, 2)
        return self.bottleneck(self.to_codes(self.encoder_blocks(grid + self.encoder_positions)))

    def decode(self, codes: Tensor) -> Tensor:
        """Codes ``(B, n, d)`` to pictures ``(B, 3, S, S)``, about ``[-1, 1]``, not clipped."""
        grid = self.decoder_blocks(self.from_codes(codes) + self.decoder_positions)
        return self.decoder_head(grid.transpose(1, 2).unflatten(2, (self.side, self.side)))

    def forward(self, pictures: Tensor) -> tuple[Tensor, Tensor]:
        """Pictures to reconstructions of the same shape, and ids or divergence."""
        codes, extra = self.encode(pictures)
        return self.decode(codes), extra

"""A vision tower over pictures and clips of any shape, and what makes rows of the model of it: ERNIE-4.5-VL's.

Patches know their row and column by rotary positions alone, and see the patches of their own frame. Behind the tower,
squares of neighbouring patches become one row, then pairs of frames do; a picture stands for both frames of its pair.
The weights come with the model that they are a part of; alone it is untrained.

Source: ERNIE 4.5's technical report, https://ernie.baidu.com/blog/publication/ERNIE_Technical_Report.pdf; rotary
positions over rows and columns as in Qwen2-VL, https://arxiv.org/abs/2409.12191.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from omnimoe.config import ConfigError
from omnimoe.encoders.base import Encoder, EncoderError, Features, register_encoder
from omnimoe.encoders.raw import whole_pictures
from omnimoe.encoders.tower import TowerConfig
from omnimoe.ops import rope

MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)
"""Of the pixels that CLIP's towers and those after them were trained on."""
FRAMES = 2
"""Frames that become one."""
LONGEST_SHAPE = 200
"""Times that a picture may be longer than wide."""

Run = tuple[int, int]
"""Frames of equal size that follow each other: how many, and patches of one."""


def fit_pixels(height: int, width: int, *, factor: int, least: int, most: int) -> tuple[int, int]:
    """The size to bring a picture to: both sides multiples of ``factor``, its area in pixels between the bounds.

    Raises:
        EncoderError: if one side is very much longer than the other.
    """
    if max(height, width) > LONGEST_SHAPE * min(height, width):
        raise EncoderError(f"a picture of {width} x {height} is too long; one side may be {LONGEST_SHAPE} of the other")
    tall, wide = round(height / factor) * factor, round(width / factor) * factor
    if tall * wide > most:
        shrunk = math.sqrt(height * width / most)
        return (
            max(factor, math.floor(height / shrunk / factor) * factor),
            max(factor, math.floor(width / shrunk / factor) * factor),
        )
    if tall * wide < least:
        grown = math.sqrt(least / (height * width))
        return math.ceil(height * grown / factor) * factor, math.ceil(width * grown / factor) * factor
    return tall, wide


class Layer(nn.Module):
    """Attention inside frames and a network of two matrices, each after a norm."""

    def __init__(self, config: RotaryViT.Config) -> None:
        from transformers.activations import ACT2FN

        super().__init__()
        width = config.hidden_size
        self.num_heads = config.num_heads
        self.norm1 = nn.LayerNorm(width, config.eps)
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width, config.eps)
        self.fc1 = nn.Linear(width, config.intermediate_size)
        self.act = ACT2FN[config.activation]
        self.fc2 = nn.Linear(config.intermediate_size, width)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, runs: list[Run]) -> Tensor:
        """``(N, C)`` patches, frame after frame, to ``(N, C)``."""
        query, key, value = self.qkv(self.norm1(x)).view(len(x), 3, self.num_heads, -1).unbind(1)
        query, key = rope(query, cos, sin), rope(key, cos, sin)
        counts, mixed = [frames * length for frames, length in runs], []
        parts = zip(*(part.split(counts) for part in (query, key, value)), strict=True)
        for part, (frames, _) in zip(parts, runs, strict=True):
            heads = (held.unflatten(0, (frames, -1)).transpose(1, 2) for held in part)  # (frames, H, n, C)
            mixed.append(F.scaled_dot_product_attention(*heads).transpose(1, 2).flatten(0, 1))
        x = x + self.proj(torch.cat(mixed).flatten(1))
        return x + self.fc2(self.act(self.fc1(self.norm2(x))))


class Merge(nn.Module):
    """Two matrices and a norm over what lies side by side."""

    def __init__(self, width: int, out_width: int, eps: float) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, out_width)
        self.fc2 = nn.Linear(out_width, out_width)
        self.norm = nn.LayerNorm(out_width, eps)

    def forward(self, x: Tensor) -> Tensor:
        """``(n, width)`` to ``(n, out_width)``."""
        return self.norm(self.fc2(F.gelu(self.fc1(x))))


@register_encoder("rotary_vit")
class RotaryViT(Encoder):
    """Patches of pictures and clips to rows of the model's width, one for each square of patches of a pair of frames.

    A picture is a path, a PIL image, or a uint8 array or tensor ``(H, W, 3)``; a clip is a list of pictures, its
    frames, or a uint8 array or tensor ``(T, H, W, 3)``.
    """

    kind = "image"

    @dataclass(frozen=True, kw_only=True)
    class Config(TowerConfig):
        """The tower and what is behind it; the defaults are ERNIE-4.5-VL's."""

        hidden_size: int = 1280
        """Width of the tower; heads must be multiples of 4 wide."""
        intermediate_size: int = 5120
        """Width of its feed-forward networks."""
        num_layers: int = 32
        """Layers."""
        activation: str = "quick_gelu"
        """Of the feed-forward networks, as transformers names it."""
        merge_size: int = 2
        """Patches along a side of a square that becomes one row."""
        out_size: int = 2560
        """Width of the rows that come out: that of the model."""
        theta: float = 10_000.0
        """Base of the rotary frequencies."""
        eps: float = 1e-6
        """Added to the variance in the norms."""
        out_eps: float = 1e-5
        """Added to the mean square in the last one."""
        min_pixels: int = 56 * 56
        """Area that smaller pictures are brought up to."""
        max_pixels: int = 28 * 28 * 6177
        """Area that larger pictures are brought down to."""

        def __post_init__(self) -> None:
            super().__post_init__()
            self.check_positive("merge_size", "out_size", "min_pixels")
            if self.hidden_size % (4 * self.num_heads):
                raise ConfigError(
                    f"heads must be multiples of 4 wide, got {self.num_heads} for hidden_size {self.hidden_size}"
                )
            if self.max_pixels < max(self.min_pixels, self.factor**2):
                raise ConfigError(
                    f"max_pixels must be at least min_pixels and a square of {self.factor} pixels, got {self}"
                )

        @property
        def factor(self) -> int:
            """Pixels along a side of what becomes one row."""
            return self.patch_size * self.merge_size

    config: RotaryViT.Config

    def __init__(self, config: RotaryViT.Config, *, weights: bool = True) -> None:
        super().__init__(config)
        self.hidden_size = config.out_size
        width = config.hidden_size * config.merge_size**2
        self.patch_embedding = nn.Linear(3 * config.patch_size**2, config.hidden_size, bias=False)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.num_layers))
        self.norm = nn.LayerNorm(config.hidden_size, config.eps)
        self.merge = Merge(width, width, config.eps)
        self.merge_frames = Merge(FRAMES * width, width, config.eps)
        self.out_proj = nn.Linear(width, config.out_size)
        self.out_norm = nn.RMSNorm(config.out_size, eps=config.out_eps)

    def prepare(self, raws: Sequence[Any], **options: Any) -> dict[str, Tensor]:
        """Pictures and clips to patches.

        Args:
            raws: B of them; they are scaled, never cropped. The last frame of an odd number of them is shown twice.
            options: none.

        Returns:
            ``patches (B, n, 3 P^2)``, squares of patches one after the other; ``grids (B, 3)`` int64, patches along
            time, height and width.

        Raises:
            EncoderError: if one is neither a picture nor a clip.
        """
        made = [self.patches(_frames(raw, place)) for place, raw in enumerate(raws)]
        return self.pad(torch.cat([patches for patches, _ in made]), torch.tensor([grid for _, grid in made]))

    def patches(self, frames: Sequence[Image.Image]) -> tuple[Tensor, tuple[int, int, int]]:
        """``(n, 3 P^2)`` patches of the frames of a clip, or of one picture, and how many lie along each axis."""
        config, size, side = self.config, self.config.patch_size, self.config.merge_size
        wide, tall = frames[0].size
        bounds = {"least": config.min_pixels, "most": config.max_pixels}
        tall, wide = fit_pixels(tall, wide, factor=config.factor, **bounds)
        resized = [np.asarray(frame.resize((wide, tall), Image.Resampling.BICUBIC), np.float32) for frame in frames]
        pixels = (torch.from_numpy(np.stack(resized)) / 255 - torch.tensor(MEAN)) / torch.tensor(STD)
        cells = pixels.unflatten(2, (-1, side, size)).unflatten(1, (-1, side, size))  # (T, H, s, P, W, s, P, 3)
        rows = cells.permute(0, 1, 4, 2, 5, 7, 3, 6).flatten(5).flatten(0, 4)
        return rows, (len(frames), tall // size, wide // size)

    def pad(self, patches: Tensor, grids: Tensor) -> dict[str, Tensor]:
        """Patches of pictures and clips one after the other, as processors of transformers give them, to one batch.

        Args:
            patches: ``(n, 3 P^2)``.
            grids: ``(B, 3)``, patches of each along time, height and width.

        Raises:
            EncoderError: if the two do not fit.
        """
        counts = grids.prod(-1).tolist()
        if patches.ndim != 2 or sum(counts) != len(patches):
            raise EncoderError(f"grids tell of {sum(counts)} patches, got {tuple(patches.shape)}; pass (n, 3 P^2)")
        return {"patches": nn.utils.rnn.pad_sequence(list(patches.split(counts)), batch_first=True), "grids": grids}

    def shapes(self, inputs: Mapping[str, Tensor]) -> list[tuple[int, int, int]]:
        """Rows along time, height and width of each picture or clip of what :meth:`prepare` gives.

        Raises:
            EncoderError: if patches make no squares, or frames no pairs.
        """
        side = self.config.merge_size
        found = []
        for frames, tall, wide in inputs["grids"].tolist():
            if min(frames, tall, wide) < 1 or tall % side or wide % side or (frames > 1 and frames % FRAMES):
                raise EncoderError(
                    f"grids holds {(frames, tall, wide)}: height and width must be multiples of {side}, and frames of "
                    f"{FRAMES}, but for the one of a picture"
                )
            found.append((-(-frames // FRAMES), tall // side, wide // side))
        return found

    def forward(self, inputs: Mapping[str, Tensor]) -> Features:
        """Patches to rows ``(B, m, C)``, C the width of the model; pooled is their mean."""
        shapes, grids = self.shapes(inputs), inputs["grids"].tolist()
        counts = [math.prod(grid) for grid in grids]
        patches = inputs["patches"].to(self.device, self.dtype)
        if max(counts) > patches.shape[1]:
            raise EncoderError(f"grids tell of {max(counts)} patches, and there are {patches.shape[1]}")
        x = self.patch_embedding(torch.cat([part[:count] for part, count in zip(patches, counts, strict=True)]))
        frames = [(tall * wide) for time, tall, wide in grids for _ in range(time)]
        runs = [(len(list(same)), length) for length, same in groupby(frames)]
        cos, sin = self._rotary(grids)
        for layer in self.layers:
            x = layer(x, cos, sin, runs)
        x = self.merge(self.norm(x).unflatten(0, (-1, self.config.merge_size**2)).flatten(1))
        rows = self.out_norm(self.out_proj(self.merge_frames(self._paired(x, grids))))
        parts = rows.split([math.prod(shape) for shape in shapes])
        lengths = torch.tensor([len(part) for part in parts], device=rows.device)
        mask = torch.arange(int(max(map(len, parts))), device=rows.device) < lengths.unsqueeze(1)
        return Features(
            rows=nn.utils.rnn.pad_sequence(list(parts), batch_first=True),
            pooled=torch.stack([part.mean(0) for part in parts]),
            mask=None if len({len(part) for part in parts}) == 1 else mask,
            shapes=torch.tensor(shapes),
        )

    def _rotary(self, grids: list[list[int]]) -> tuple[Tensor, Tensor]:
        """Cosines and sines ``(N, C/2)`` of the patches: half of the frequencies turn with the row, half with the
        column."""
        side, places = self.config.merge_size, []
        for frames, tall, wide in grids:
            grid = torch.stack(torch.meshgrid(torch.arange(tall), torch.arange(wide), indexing="ij"), dim=-1)
            squares = grid.unflatten(1, (-1, side)).unflatten(0, (-1, side)).transpose(1, 2)  # (H, W, s, s, 2)
            places.append(squares.flatten(0, 3).repeat(frames, 1))
        half = self.config.hidden_size // self.config.num_heads // 2
        frequency = 1.0 / self.config.theta ** (torch.arange(0, half, 2, dtype=torch.float32) / half)
        angle = (torch.cat(places).float().unsqueeze(-1) * frequency).flatten(1).to(self.device)
        return angle.cos(), angle.sin()

    def _paired(self, x: Tensor, grids: list[list[int]]) -> Tensor:
        """``(n, C)`` rows of all frames to ``(m, 2 C)``: those of both frames of a pair side by side."""
        side, parts = self.config.merge_size, []
        counts = [math.prod(grid) // side**2 for grid in grids]
        for part, (frames, _, _) in zip(x.split(counts), grids, strict=True):
            if frames == 1:
                parts.append(torch.cat((part, part), dim=1))
            else:
                pairs = part.unflatten(0, (frames // FRAMES, FRAMES, -1))
                parts.append(pairs.transpose(1, 2).flatten(2).flatten(0, 1))
        return torch.cat(parts)


def _frames(raw: Any, place: int) -> list[Image.Image]:
    """The frames of a clip, an even number, or the one picture."""
    is_clip = isinstance(raw, list | tuple) or (isinstance(raw, np.ndarray | Tensor) and raw.ndim == 4)
    if not is_clip:
        try:
            return whole_pictures([raw])
        except EncoderError as error:
            raise EncoderError(str(error).replace("input 0", f"input {place}")) from error
    if not len(raw):
        raise EncoderError(f"input {place}: a clip without frames")
    frames = whole_pictures(list(raw))
    if len({frame.size for frame in frames}) > 1:
        raise EncoderError(f"input {place}: the frames of a clip must have one size, got {[f.size for f in frames]}")
    return frames if len(frames) % FRAMES == 0 else [*frames, frames[-1]]


__all__ = ["RotaryViT", "fit_pixels"]

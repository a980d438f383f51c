"""A waveform to rows by convolutions, behind a learned row for the whole of it: what enters ONE-PEACE.

Where a row stands is told by convolutions over its neighbours. What follows a clip in a batch counts for nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from omnimoe.config import ConfigError
from omnimoe.encoders.base import Encoder, EncoderError, Features, register_encoder
from omnimoe.encoders.raw import waveforms_at

SAMPLE_RATE = 16_000


@register_encoder("wave_stem")
class WaveStem(Encoder):
    """Clips to a class row and, with the defaults, 50 rows a second.

    Source: https://arxiv.org/abs/2006.11477; positions https://arxiv.org/abs/2202.03555; both with a class row
    https://arxiv.org/abs/2305.11172.
    """

    kind = "audio"

    @dataclass(frozen=True, kw_only=True)
    class Config(Encoder.Config):
        """Convolutions over a waveform."""

        hidden_size: int = 768
        """Width C."""
        inner_size: int = 512
        """Channels of the convolutions."""
        kernels: tuple[int, ...] = (10, 3, 3, 3, 3, 2, 2)
        """Samples that each convolution sees of what the one before gives."""
        strides: tuple[int, ...] = (5, 2, 2, 2, 2, 2, 2)
        """Samples from one of its results to the next."""
        position_layers: int = 5
        """Convolutions that tell where a row stands."""
        position_kernel: int = 19
        """Rows that each of them sees."""
        position_groups: int = 16
        """Groups of their channels."""
        max_seconds: int = 15
        """Clips are cut behind so many seconds; those of less than one are repeated up to one."""

        def __post_init__(self) -> None:
            super().__post_init__()
            if len(self.kernels) != len(self.strides) or min((1, *self.kernels, *self.strides)) < 1 or not self.kernels:
                raise ConfigError(f"kernels {self.kernels} and strides {self.strides} must be numbers from 1, in pairs")
            if self.position_groups < 1 or self.hidden_size % self.position_groups or self.position_kernel % 2 == 0:
                raise ConfigError(
                    f"position_groups {self.position_groups} must divide hidden_size {self.hidden_size}, and "
                    f"position_kernel {self.position_kernel} be odd"
                )

        def num_rows(self, samples: Tensor) -> Tensor:
            """Rows of clips of so many samples, without the class row."""
            for kernel, stride in zip(self.kernels, self.strides, strict=True):
                samples = torch.div(samples - kernel, stride, rounding_mode="floor") + 1
            return samples

    config: WaveStem.Config

    def __init__(self, config: WaveStem.Config, *, weights: bool = True) -> None:
        super().__init__(config)
        self.hidden_size, inner = config.hidden_size, config.inner_size
        sizes = list(zip(config.kernels, config.strides, strict=True))
        self.convolutions = nn.ModuleList(
            nn.Conv1d(inner if place else 1, inner, kernel, stride, bias=False)
            for place, (kernel, stride) in enumerate(sizes)
        )
        self.norms = nn.ModuleList(nn.LayerNorm(inner) for _ in sizes)
        self.norm = nn.LayerNorm(inner)
        self.proj = nn.Linear(inner, config.hidden_size)
        wide, seen, groups = config.hidden_size, config.position_kernel, config.position_groups
        self.positions = nn.ModuleList(
            nn.Conv1d(wide, wide, seen, padding=seen // 2, groups=groups) for _ in range(config.position_layers)
        )
        self.cls_token = nn.Parameter(torch.zeros(config.hidden_size))
        self.cls_position = nn.Parameter(torch.zeros(config.hidden_size))
        for row in (self.cls_token, self.cls_position):
            nn.init.normal_(row, std=0.02)

    def prepare(self, raws: Sequence[Any], *, sample_rate: int = SAMPLE_RATE, **options: Any) -> dict[str, Tensor]:
        """Clips to ``waves (B, n)``, each with mean 0 and deviation 1, zeros behind, and ``lengths (B,)``.

        Args:
            raws: B clips ``(n,)``, floating point in [-1, 1] or int16, one channel.
            sample_rate: of the clips in Hz; other rates than 16,000 are resampled.
            options: none.

        Raises:
            EncoderError: if one is empty or not finite.
        """
        clips = []
        for clip in waveforms_at(raws, sample_rate, SAMPLE_RATE):
            clip = F.layer_norm(clip, clip.shape)[: self.config.max_seconds * SAMPLE_RATE]
            clips.append(clip.repeat(-(-SAMPLE_RATE // len(clip)))[: max(len(clip), SAMPLE_RATE)])
        lengths = torch.tensor([len(clip) for clip in clips])
        return {"waves": pad_sequence(clips, batch_first=True), "lengths": lengths}

    def forward(self, inputs: Mapping[str, Tensor]) -> Features:
        """Clips to rows ``(B, 1 + n, C)``, the class row first; pooled is that row.

        Raises:
            EncoderError: if a clip is too short for a row.
        """
        counts = self.config.num_rows(inputs["lengths"].to(self.device))
        x = inputs["waves"].to(self.device, self.dtype).unsqueeze(1)
        if int(counts.min()) < 1:
            raise EncoderError(f"clip {int(counts.argmin())} is too short for a row; repeat it, as prepare does")
        for into, norm in zip(self.convolutions, self.norms, strict=True):
            x = F.gelu(norm(into(x).transpose(1, 2))).transpose(1, 2)
        rows = self.proj(self.norm(x.transpose(1, 2)))
        mask = torch.arange(rows.shape[1], device=rows.device) < counts.unsqueeze(1)
        place = rows
        for into in self.positions:
            place = torch.where(mask.unsqueeze(2), place, 0)  # as a convolution sees the end of a clip
            place = F.gelu(F.layer_norm(into(place.transpose(1, 2)).transpose(1, 2), (self.hidden_size,)))
        whole = (self.cls_token + self.cls_position).expand(len(rows), 1, -1)
        rows, mask = torch.cat((whole, rows + place), dim=1), F.pad(mask, (1, 0), value=True)
        return Features(rows=rows, pooled=whole.squeeze(1), mask=None if bool(mask.all()) else mask)


__all__ = ["WaveStem"]

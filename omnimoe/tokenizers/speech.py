"""Speech to a stream of discrete units and back: 25 units a second, one of 1,000 each, at 16 kHz.

A unit stands for 40 ms: four frames of a log-mel spectrogram. The decoder writes log magnitudes of the full spectrum,
and phases are found by Griffin-Lim with momentum, which needs no training; so the whole tokenizer is 2.9 M parameters.
Loudness is not coded: a clip is set to one peak level before it is encoded, and comes back at that level.

Sources: units of a bounded grid as in https://arxiv.org/abs/2309.15505 (FSQ), blocks as in https://arxiv.org/abs/2306.00814
(Vocos), phases as in Perraudin et al., "A fast Griffin-Lim algorithm", WASPAA 2013.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from omnimoe.config import Config, ConfigError
from omnimoe.config import Config as ConfigBase
from omnimoe.tokenizers.base import TokenizerError, register_tokenizer
from omnimoe.tokenizers.codec import CodecTokenizer
from omnimoe.tokenizers.fsq import FSQ
from omnimoe.tokenizers.waveforms import to_waveform

SAMPLE_RATE = 16_000
FLOOR = 0.02
"""Least magnitude that counts: 78 dB below a sine of full scale in the default window."""
_PEAK = 0.89


class Spectrum(nn.Module):
    """Waveforms to magnitudes and log-mel features, and magnitudes back to waveforms.

    Args:
        window: samples of a frame.
        hop: samples between frames, at most a quarter of ``window``.
        num_mels: mel bands of the features.
    """

    def __init__(self, window: int, hop: int, num_mels: int) -> None:
        super().__init__()
        from torchaudio.functional import melscale_fbanks

        self.hop, self.size = hop, window
        self.num_bins = window // 2 + 1
        self.register_buffer("window", torch.hann_window(window), persistent=False)
        filters = melscale_fbanks(self.num_bins, 20.0, SAMPLE_RATE / 2, num_mels, SAMPLE_RATE, norm="slaney")
        # Slaney's norm gives bands of equal area; this factor brings their level back near that of the bins.
        self.register_buffer("filters", filters * (SAMPLE_RATE / window), persistent=False)

    def magnitudes(self, waveforms: Tensor) -> Tensor:
        """``(B, n)`` float32, ``n`` a multiple of the hop, to ``(B, n / hop, bins)``; a frame at each hop's start."""
        return self._stft(waveforms)[..., :-1].abs().transpose(1, 2)

    def log_mel(self, magnitudes: Tensor) -> Tensor:
        """``(B, frames, bins)`` to ``(B, frames, num_mels)``, natural logarithm, floored."""
        return (magnitudes @ self.filters).clamp_min(FLOOR).log()

    def waveforms(self, magnitudes: Tensor, *, num_iterations: int = 48, momentum: float = 0.99) -> Tensor:
        """``(B, frames, bins)`` to ``(B, frames * hop)`` by fast Griffin-Lim, from a fixed random phase."""
        target = torch.cat([magnitudes, magnitudes[:, -1:]], dim=1).transpose(1, 2)
        generator = torch.Generator().manual_seed(0)
        phase = torch.rand(target.shape[1:], generator=generator).to(target) * (2 * torch.pi)
        angles, previous = torch.polar(torch.ones_like(phase), phase).expand_as(target), None
        for _ in range(num_iterations):
            rebuilt = self._stft(self._istft(target * angles))
            ahead = rebuilt if previous is None else rebuilt + momentum * (rebuilt - previous)
            angles, previous = ahead / ahead.abs().clamp_min(1e-8), rebuilt
        return self._istft(target * angles)

    def _stft(self, waveforms: Tensor) -> Tensor:
        return torch.stft(
            waveforms, self.size, self.hop, window=self.window, center=True, pad_mode="constant", return_complex=True
        )

    def _istft(self, spectrum: Tensor) -> Tensor:
        length = (spectrum.shape[-1] - 1) * self.hop
        return torch.istft(spectrum, self.size, self.hop, window=self.window, center=True, length=length)


class ConvBlock(nn.Module):
    """Depthwise convolution over time, then a two-layer MLP, with a residual; ``(B, T, D)`` to the same."""

    def __init__(self, hidden_size: int, intermediate_size: int, kernel_size: int = 7) -> None:
        super().__init__()
        self.depthwise = nn.Conv1d(hidden_size, hidden_size, kernel_size, padding=kernel_size // 2, groups=hidden_size)
        self.norm = nn.LayerNorm(hidden_size)
        self.up_proj = nn.Linear(hidden_size, intermediate_size)
        self.down_proj = nn.Linear(intermediate_size, hidden_size)
        nn.init.zeros_(self.down_proj.weight)
        nn.init.zeros_(self.down_proj.bias)

    def forward(self, x: Tensor) -> Tensor:
        mixed = self.depthwise(x.transpose(1, 2)).transpose(1, 2)
        return x + self.down_proj(F.gelu(self.up_proj(self.norm(mixed))))


class SpeechAutoencoder(nn.Module):
    """The network: features to codes at the rate of units, codes to log magnitudes at the rate of frames.

    Args:
        window, hop, num_mels: see :class:`Spectrum`.
        frames_per_unit: frames that one unit stands for.
        hidden_size: width at the rate of units; half of it at the rate of frames.
        encoder_blocks, decoder_blocks: blocks at the rate of units.
        frame_blocks: blocks of the decoder at the rate of frames.
        levels: FSQ levels.
    """

    def __init__(
        self,
        *,
        window: int,
        hop: int,
        num_mels: int,
        frames_per_unit: int,
        hidden_size: int,
        encoder_blocks: int,
        decoder_blocks: int,
        frame_blocks: int,
        levels: tuple[int, ...],
    ) -> None:
        super().__init__()
        self.spectrum = Spectrum(window, hop, num_mels)
        self.frames_per_unit = frames_per_unit
        self.fsq = FSQ(levels)
        fine = hidden_size // 2
        self.encoder = nn.Sequential(
            nn.Linear(num_mels * frames_per_unit, hidden_size),
            *(ConvBlock(hidden_size, 2 * hidden_size) for _ in range(encoder_blocks)),
            nn.LayerNorm(hidden_size),
            nn.Linear(hidden_size, len(levels)),
        )
        self.decoder = nn.Sequential(
            nn.Linear(len(levels), hidden_size),
            *(ConvBlock(hidden_size, 2 * hidden_size) for _ in range(decoder_blocks)),
            nn.LayerNorm(hidden_size),
            nn.Linear(hidden_size, fine * frames_per_unit),
        )
        self.frame_decoder = nn.Sequential(
            *(ConvBlock(fine, 2 * fine) for _ in range(frame_blocks)),
            nn.LayerNorm(fine),
            nn.Linear(fine, self.spectrum.num_bins),
        )

    def encode(self, magnitudes: Tensor) -> tuple[Tensor, Tensor]:
        """Magnitudes ``(B, U * frames_per_unit, bins)`` to codes ``(B, U, d)`` float32 and ids ``(B, U)`` int64."""
        features = self.spectrum.log_mel(magnitudes) / 2
        return self.fsq(self.encoder(features.unflatten(1, (-1, self.frames_per_unit)).flatten(2)))

    def decode(self, codes: Tensor) -> Tensor:
        """Codes ``(B, U, d)`` to log magnitudes ``(B, U * frames_per_unit, bins)``."""
        frames = self.decoder(codes).unflatten(2, (self.frames_per_unit, -1)).flatten(1, 2)
        return 2 * self.frame_decoder(frames)

    def forward(self, magnitudes: Tensor) -> tuple[Tensor, Tensor]:
        """Magnitudes to log magnitudes of the same shape, and ids ``(B, U)``."""
        codes, ids = self.encode(magnitudes)
        return self.decode(codes), ids


@register_tokenizer("speech")
class SpeechTokenizer(CodecTokenizer):
    """16 kHz speech to 25 ids of 1,000 a second, and back.

    Trained on one synthetic voice: another voice comes back in that voice's timbre, and less clearly.

    Example:
        >>> tokenizer = SpeechTokenizer.from_pretrained()
        >>> ids = tokenizer.encode(np.sin(np.arange(16_000) * 0.05).astype(np.float32))
        >>> ids.shape, tokenizer.decode(ids).shape
        (torch.Size([25]), (16000,))
    """

    modality = "speech"
    sample_rate = SAMPLE_RATE
    shipped = "speech_25hz.safetensors"
    network: SpeechAutoencoder

    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Config(ConfigBase):
        window: int = 640
        """Samples of a spectral frame: 40 ms."""
        hop: int = 160
        """Samples between frames: 10 ms; at most a quarter of ``window``, or phases cannot be found."""
        num_mels: int = 80
        """Mel bands the encoder hears."""
        frames_per_unit: int = 4
        """Frames a unit stands for; 4 gives 25 units a second."""
        hidden_size: int = 288
        """Width at the rate of units; half of it at the rate of frames."""
        encoder_blocks: int = 3
        """Blocks of the encoder."""
        decoder_blocks: int = 4
        """Blocks of the decoder at the rate of units."""
        frame_blocks: int = 3
        """Blocks of the decoder at the rate of frames."""
        levels: tuple[int, ...] = (8, 5, 5, 5)
        """FSQ levels; their product is the vocabulary."""

    def __init__(self, config: Config) -> None:
        if config.hop < 1 or config.window < 4 * config.hop:
            raise ConfigError(f"hop must be 1 to a quarter of window ({config.window}), got {config.hop}")
        if config.hidden_size % 2 or config.frames_per_unit < 1:
            raise ConfigError(
                "hidden_size must be even and frames_per_unit at least 1, "
                f"got {config.hidden_size} and {config.frames_per_unit}"
            )
        fields = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
        super().__init__(config, SpeechAutoencoder(**fields))
        self.vocab_size = self.network.fsq.num_codes
        self.samples_per_unit = config.hop * config.frames_per_unit

    @property
    def units_per_second(self) -> float:
        """Ids that a second of speech gives."""
        return SAMPLE_RATE / self.samples_per_unit

    @torch.no_grad()
    def encode(self, raw: Any, sample_rate: int = SAMPLE_RATE) -> Tensor:
        """A clip to ids.

        Args:
            raw: ``(n,)`` floating point in ``[-1, 1]``, or int16; one channel; an array, tensor or sequence.
            sample_rate: of ``raw`` in Hz; other rates than 16,000 are resampled.

        Returns:
            ``(ceil(n / 640),)`` int64 for 16 kHz; the end is padded with silence to a whole unit.

        Raises:
            TokenizerError: if ``raw`` is empty, has several channels, is not finite or lies out of range, or the rate
                is not a positive integer.
        """
        waveform = to_waveform(raw, sample_rate, SAMPLE_RATE).to(self.device)
        padding = -len(waveform) % self.samples_per_unit
        waveform = to_peak(F.pad(waveform, (0, padding)))
        return self.network.encode(self.network.spectrum.magnitudes(waveform[None]))[1][0].cpu()

    @torch.no_grad()
    def decode(self, ids: Any) -> np.ndarray:
        """Ids ``(n,)`` to a waveform, ``(n * 640,)`` float32 in ``[-1, 1]`` at 16 kHz; the same ids give the same.

        Raises:
            TokenizerError: if an id is out of range, or there is more than one axis.
        """
        ids = self.check_ids(ids)
        if ids.ndim != 1:
            raise TokenizerError(f"decode takes the ids of one clip, not {tuple(ids.shape)}")
        if not len(ids):
            return np.zeros(0, np.float32)
        magnitudes = self.network.decode(self.network.fsq.ids_to_codes(ids[None].to(self.device))).exp()
        # What lies at the floor was silence; left in, a clip's pauses hiss.
        magnitudes = torch.where(magnitudes < 1.5 * FLOOR, 0.0, magnitudes)
        return self.network.spectrum.waveforms(magnitudes)[0].clamp(-1, 1).cpu().numpy()


def to_peak(waveform: Tensor) -> Tensor:
    """``(n,)`` scaled so that its largest sample is 0.89, -1 dB; near silence (below -60 dB) stays as it is."""
    peak = waveform.abs().amax()
    return torch.where(peak > 1e-3, waveform * (_PEAK / peak.clamp_min(1e-9)), waveform)

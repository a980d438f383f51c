"""Speech and sound to ids by the published neural codecs that transformers has: Mimi, EnCodec and DAC.

Each codes a frame with several codebooks, the later ones refining the earlier. The ids of a frame stand in a row, first
codebook first, each with its own range (:mod:`omnimoe.tokenizers.code_frames`): ``vocab_size`` is K times the size of a
codebook. ``encode_codes`` and ``decode_codes`` give and take the codes ``(K, T)`` for other arrangements.

Sources: https://arxiv.org/abs/2410.00037 (Mimi), https://arxiv.org/abs/2210.13438 (EnCodec),
https://arxiv.org/abs/2306.06546 (DAC).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from omnimoe.config import Config as ConfigBase
from omnimoe.config import ConfigError
from omnimoe.tokenizers.adapters import AdapterTokenizer
from omnimoe.tokenizers.base import TokenizerError, register_tokenizer
from omnimoe.tokenizers.code_frames import CodeFramesTokenizer, check_codes
from omnimoe.tokenizers.waveforms import USUAL_RATE, to_waveform


class NeuralCodecTokenizer(CodeFramesTokenizer, AdapterTokenizer):
    """What the three share; a subclass says how its class encodes and decodes.

    Attributes:
        num_codebooks: K, ids a frame.
        frames_per_second: frames of K ids.
        units_per_second: ids.

    Args:
        config: how many codebooks are used.
        model: the class of transformers, loaded.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config(ConfigBase):
        num_codebooks: int | None = None
        """Codebooks used, from the first; fewer make shorter spans and coarser sound. None for all."""

    def __init__(self, config: Config, *, model: Any) -> None:
        super().__init__(config, model=model)
        if getattr(model.config, "audio_channels", 1) != 1:
            raise TokenizerError(
                f"this {self.library_class} has {model.config.audio_channels} channels, and a clip has one; take a "
                "model of one channel"
            )
        choices = self.choices()
        self.num_codebooks = config.num_codebooks or choices[-1]
        if self.num_codebooks not in choices:
            raise ConfigError(
                f"this model has {', '.join(map(str, choices))} codebooks to choose from, got {config.num_codebooks}"
            )
        self.codebook_sizes = (model.config.codebook_size,) * self.num_codebooks
        self.vocab_size = sum(self.codebook_sizes)
        self.sample_rate = model.config.sampling_rate
        self.frames_per_second = self.sample_rate / self.samples_per_frame
        self.units_per_second = self.frames_per_second * self.num_codebooks

    @property
    def samples_per_frame(self) -> int:
        """Samples at the codec's rate that a frame stands for."""
        return self.model.config.hop_length

    def choices(self) -> list[int]:
        """The numbers of codebooks that may be used, in order."""
        raise NotImplementedError(f"{type(self).__name__} does not define choices")

    @torch.no_grad()
    def encode_codes(self, raw: Any, sample_rate: int = USUAL_RATE) -> Tensor:
        """A clip to codes ``(K, T)`` int64, a row a codebook; the end is padded with silence to a whole frame."""
        waveform = to_waveform(raw, sample_rate, self.sample_rate)
        waveform = F.pad(waveform, (0, -len(waveform) % self.samples_per_frame))
        return self.to_codes(waveform[None, None].to(self.device))[0].cpu()

    @torch.no_grad()
    def decode_codes(self, codes: Tensor) -> np.ndarray:
        """Codes ``(K, T)`` to a waveform, ``(samples,)`` float32 in ``[-1, 1]``.

        Raises:
            TokenizerError: if the shape does not fit, or a code is out of range.
        """
        check_codes(codes, self.codebook_sizes)
        if not codes.shape[1]:
            return np.zeros(0, np.float32)
        return self.to_samples(codes[None].to(self.device)).flatten().clamp(-1, 1).cpu().numpy()

    def to_codes(self, waveforms: Tensor) -> Tensor:
        """``(1, 1, n)`` to ``(1, K, T)``."""
        raise NotImplementedError(f"{type(self).__name__} does not define to_codes")

    def to_samples(self, codes: Tensor) -> Tensor:
        """``(1, K, T)`` to ``(1, ..., n)``."""
        raise NotImplementedError(f"{type(self).__name__} does not define to_samples")


@register_tokenizer("mimi")
class MimiTokenizer(NeuralCodecTokenizer):
    """24 kHz, 12.5 frames a second, up to 32 codebooks of 2,048; the first one is distilled from a speech encoder."""

    library_class = "MimiModel"

    @property
    def samples_per_frame(self) -> int:
        return self.model.config.frame_size

    def choices(self) -> list[int]:
        # The first, semantic codebooks cannot be left out.
        return list(range(self.model.config.num_semantic_quantizers, self.model.config.num_quantizers + 1))

    def to_codes(self, waveforms: Tensor) -> Tensor:
        return self.model.encode(waveforms, num_quantizers=self.num_codebooks).audio_codes

    def to_samples(self, codes: Tensor) -> Tensor:
        return self.model.decode(codes).audio_values


@register_tokenizer("encodec")
class EncodecTokenizer(NeuralCodecTokenizer):
    """24 kHz, 75 frames a second, 2, 4, 8, 16 or 32 codebooks of 1,024; the number says the bandwidth.

    Models that encode in chunks, each with a scale of its own (48 kHz), are refused: a scale is not an id.
    """

    library_class = "EncodecModel"

    def __init__(self, config: NeuralCodecTokenizer.Config, *, model: Any) -> None:
        if model.config.normalize or model.config.chunk_length_s is not None:
            raise TokenizerError(
                "this EncodecModel scales chunks one by one, and ids do not carry the scales; take one without, such "
                "as that of 24 kHz"
            )
        super().__init__(config, model=model)

    def choices(self) -> list[int]:
        return sorted(self._bandwidths())

    def _bandwidths(self) -> dict[int, float]:
        """Number of codebooks to bandwidth in kbit/s."""
        count = self.model.quantizer.get_num_quantizers_for_bandwidth
        return {int(count(bandwidth)): bandwidth for bandwidth in self.model.config.target_bandwidths}

    def to_codes(self, waveforms: Tensor) -> Tensor:
        return self.model.encode(waveforms, bandwidth=self._bandwidths()[self.num_codebooks]).audio_codes[0]

    def to_samples(self, codes: Tensor) -> Tensor:
        return self.model.decode(codes[None], [None]).audio_values


@register_tokenizer("dac")
class DacTokenizer(NeuralCodecTokenizer):
    """16, 24 or 44.1 kHz; at 16 kHz 50 frames a second and 12 codebooks of 1,024, at 44.1 kHz 86 and 9."""

    library_class = "DacModel"

    def choices(self) -> list[int]:
        return list(range(1, self.model.config.n_codebooks + 1))

    def to_codes(self, waveforms: Tensor) -> Tensor:
        return self.model.encode(waveforms, n_quantizers=self.num_codebooks).audio_codes

    def to_samples(self, codes: Tensor) -> Tensor:
        return self.model.decode(audio_codes=codes).audio_values

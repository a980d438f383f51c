"""Speech to ids by Codec 2, a parametric vocoder of 700 to 3,200 bit/s: no weights to load, and any voice comes back.

At 700 bit/s (mode 700C) a frame of 40 ms is four numbers: two stages of a vector quantiser of the spectrum (9 bits
each), the energy (4) and the pitch (6). They become four ids in a row, each field with a range of its own
(:mod:`omnimoe.tokenizers.code_frames`): 100 ids a second of 512 + 512 + 16 + 64 = 1,104. The other modes pack fields
of many sizes into bytes, and each byte of a frame becomes an id, again with ranges of their own.

Decoding uses random phases, from a generator inside the library that cannot be set. So each clip is decoded by a fresh
process, a fraction of a second, and equal ids give equal sound; it is that of the command ``c2dec``.

Source: D. Rowe, "Codec 2", https://github.com/drowe67/codec2 (LGPL-2.1), through ``pycodec2`` (BSD).
"""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from omnimoe.config import Config as ConfigBase
from omnimoe.config import ConfigError
from omnimoe.tokenizers.adapters import read_config, write_config
from omnimoe.tokenizers.base import TokenizerError, register_tokenizer
from omnimoe.tokenizers.code_frames import CodeFramesTokenizer, check_codes
from omnimoe.tokenizers.waveforms import USUAL_RATE, to_waveform

SAMPLE_RATE = 8_000

FIELDS: dict[str, tuple[int, ...]] = {
    "700C": (9, 9, 4, 6),
    "1200": (8,) * 6,
    "1300": (*(8,) * 6, 4),
    "1400": (8,) * 7,
    "1600": (8,) * 8,
    "2400": (8,) * 6,
    "3200": (8,) * 8,
}
"""Mode to the bits of each id of a frame, in the order in which they are sent."""

_DECODER = """
import sys, numpy, pycodec2
codec = pycodec2.Codec2(int(sys.argv[1]))
data, size = sys.stdin.buffer.read(), codec.bytes_per_frame()
samples = [codec.decode(data[start : start + size]) for start in range(0, len(data), size)]
sys.stdout.buffer.write(numpy.concatenate(samples).tobytes())
"""


@register_tokenizer("codec2")
class Codec2Tokenizer(CodeFramesTokenizer):
    """8 kHz speech to ids, frame by frame, and back.

    Attributes:
        codebook_sizes: number of values of each field of a frame.
        samples_per_frame: 320 samples, 40 ms, and 160 in the two highest modes.
        units_per_second: ids.

    Raises:
        ConfigError: if there is no such mode.
        TokenizerError: if pycodec2 is not installed.
    """

    sample_rate = SAMPLE_RATE

    config: Config

    @dataclass(frozen=True, kw_only=True)
    class Config(ConfigBase):
        mode: str = "700C"
        """``"700C"``, ``"1200"``, ``"1300"``, ``"1400"``, ``"1600"``, ``"2400"`` or ``"3200"``: bits a second."""

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        if config.mode not in FIELDS:
            raise ConfigError(f"mode must be one of {', '.join(FIELDS)}, got {config.mode!r}")
        self._bits = FIELDS[config.mode]
        self._number = int(config.mode.rstrip("C"))
        codec = self._new_codec()
        if codec.bits_per_frame() != sum(self._bits):
            raise TokenizerError(
                f"this libcodec2 sends {codec.bits_per_frame()} bits a frame in mode {config.mode}, not "
                f"{sum(self._bits)}; install a release of version 1"
            )
        self.codebook_sizes = tuple(2**bits for bits in self._bits)
        self.vocab_size = sum(self.codebook_sizes)
        self.samples_per_frame = codec.samples_per_frame()
        self.units_per_second = SAMPLE_RATE / self.samples_per_frame * len(self._bits)

    def encode_codes(self, raw: Any, sample_rate: int = USUAL_RATE) -> Tensor:
        """A clip to codes ``(fields, frames)`` int64; the end is padded with silence to a whole frame."""
        waveform = to_waveform(raw, sample_rate, SAMPLE_RATE).numpy()
        samples = (waveform * 32767).round().clip(-32768, 32767).astype(np.int16)
        samples = np.pad(samples, (0, -len(samples) % self.samples_per_frame))
        codec = self._new_codec()
        sent = [codec.encode(frame) for frame in samples.reshape(-1, self.samples_per_frame)]
        bits = np.unpackbits(np.frombuffer(b"".join(sent), np.uint8).reshape(len(sent), -1), axis=1)
        fields, start = [], 0
        for width in self._bits:
            fields.append(bits[:, start : start + width].astype(np.int64) @ (1 << np.arange(width)[::-1]))
            start += width
        return torch.from_numpy(np.stack(fields))

    def decode_codes(self, codes: Tensor) -> np.ndarray:
        """Codes ``(fields, frames)`` to a waveform ``(samples,)``, float32 in ``[-1, 1]``; equal codes, equal sound.

        Raises:
            TokenizerError: if the shape does not fit, a code is out of range, or the decoding process fails.
        """
        check_codes(codes, self.codebook_sizes)
        if not codes.shape[1]:
            return np.zeros(0, np.float32)
        values = codes.numpy()
        bits = [values[field, :, None] >> np.arange(width)[::-1] & 1 for field, width in enumerate(self._bits)]
        packed = np.packbits(np.concatenate(bits, axis=1).astype(np.uint8), axis=1)
        # -P keeps modules of the current folder out.
        command = [sys.executable, "-P", "-c", _DECODER, str(self._number)]
        done = subprocess.run(command, input=packed.tobytes(), capture_output=True, check=False)
        if done.returncode:
            raise TokenizerError(f"Codec 2 could not decode: {done.stderr.decode(errors='replace').strip()[-300:]}")
        return np.frombuffer(done.stdout, np.int16).astype(np.float32) / 32768

    def _new_codec(self) -> Any:
        """A codec with no past, so that a clip does not depend on those before."""
        try:
            import pycodec2
        except ImportError as error:
            raise TokenizerError(f"codec2 needs pycodec2 ({error}): pip install 'omnimoe[codec2]'") from error
        return pycodec2.Codec2(self._number)

    @classmethod
    def from_pretrained(cls, path: str | PathLike[str] | None = None, **options: Any) -> Self:
        """The codec; there are no weights.

        Args:
            path: a folder of :meth:`save_pretrained`; None for mode 700C.
            options: ``mode``.
        """
        config = cls.Config() if path is None else read_config(cls, Path(path) / "codec2_tokenizer.json")
        return cls(config.replace(**options))

    def save_pretrained(self, path: str | PathLike[str]) -> None:
        """Writes the mode into ``codec2_tokenizer.json`` in the folder ``path``."""
        Path(path).mkdir(parents=True, exist_ok=True)
        write_config(self.config, Path(path) / "codec2_tokenizer.json")

"""Raw inputs and outputs: what was generated, and the files it comes from and goes to."""

from __future__ import annotations

import wave
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor


class GenerationError(ValueError):
    """A model, a modality or an input that cannot be generated from or to."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Generated:
    """One generated span.

    Args:
        modality: its modality.
        ids: ``(n,)`` int64 local ids, as the modality's tokenizer has them; None for a continuous modality.
        rows: ``(n, C)`` float32 latent rows of a continuous modality, else None.
        raw: what they decode to: a str, a picture ``(H, W, 3)`` or frames ``(T, H, W, 3)`` uint8, or a waveform
            ``(samples,)`` float32.
        sample_rate: of a waveform in Hz, else None.
        score: log-likelihood of the inputs given this output in nats, where outputs were ranked by it, else None.
    """

    modality: str
    raw: Any
    ids: Tensor | None = None
    rows: Tensor | None = None
    sample_rate: int | None = None
    score: float | None = None

    def __len__(self) -> int:
        """Positions it takes in a sequence, without boundary tokens."""
        held = self.ids if self.ids is not None else self.rows
        return 0 if held is None else len(held)

    def save(self, path: str | PathLike[str]) -> Path:
        """Writes the raw output: text as UTF-8, a picture in the format of the ending, a waveform as 16-bit WAV.

        Frames become a moving ``.gif`` or ``.webp`` of eight a second.

        Returns:
            The path.

        Raises:
            GenerationError: if the ending does not fit the modality.
        """
        path = Path(path)
        if isinstance(self.raw, str):
            path.write_text(self.raw + "\n", encoding="utf-8")
        elif self.sample_rate is not None:
            if path.suffix.lower() != ".wav":
                raise GenerationError(f"speech is written as .wav, not as {path.name!r}; change the ending")
            with wave.open(str(path), "wb") as file:
                file.setnchannels(1)
                file.setsampwidth(2)
                file.setframerate(self.sample_rate)
                file.writeframes((self.raw.clip(-1, 1) * 32767).round().astype("<i2").tobytes())
        elif self.raw.ndim == 4:
            if path.suffix.lower() not in (".gif", ".webp"):
                raise GenerationError(f"frames are written as .gif or .webp, not as {path.name!r}; change the ending")
            first, *others = [Image.fromarray(frame) for frame in self.raw]
            first.save(path, save_all=True, append_images=others, duration=125, loop=0)
        else:
            endings = Image.registered_extensions()
            if endings.get(path.suffix.lower()) not in Image.SAVE:
                raise GenerationError(f"a picture is written as .png, .jpg or .webp, not as {path.name!r}")
            Image.fromarray(self.raw).save(path)
        return path


def read_wave(path: str | PathLike[str]) -> tuple[np.ndarray, int]:
    """Reads a WAV file, for ``("speech", read_wave(path))``.

    Args:
        path: of 8, 16, 24 or 32-bit PCM; channels are averaged.

    Returns:
        ``(samples,)`` float32 in [-1, 1], and the rate in Hz. The speech tokenizer resamples other rates than its own.

    Raises:
        GenerationError: if there is no such file, or it is no PCM WAV file.
    """
    try:
        with wave.open(str(path), "rb") as file:
            channels, width, rate = file.getnchannels(), file.getsampwidth(), file.getframerate()
            data = file.readframes(file.getnframes())
    except FileNotFoundError:
        raise GenerationError(f"no sound at {path}") from None
    except (wave.Error, EOFError, OSError) as error:
        raise GenerationError(f"{path} is not a PCM WAV file: {error or 'it ends early'}; convert it first") from None
    samples = np.frombuffer(data[: len(data) // (channels * width) * channels * width], np.uint8).reshape(-1, width)
    # A sample's bytes go to the top of 32 bits, the lowest first; 8-bit samples are unsigned.
    wide = np.zeros((len(samples), 4), np.uint8)
    wide[:, 4 - width :] = samples if width > 1 else samples ^ 0x80
    waveform = wide.view("<i4").reshape(-1, channels).astype(np.float32) / 2**31
    return waveform.mean(axis=1), rate

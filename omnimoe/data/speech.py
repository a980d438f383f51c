"""Speech for captions: synthesised once a text, 16 kHz, trimmed, kept in the cache."""

from __future__ import annotations

import hashlib
import os
from importlib.metadata import version
from pathlib import Path

import numpy as np
from tqdm import tqdm

from omnimoe.data.sources import SourceError, cache_folder

SAMPLE_RATE = 16_000
MIN_SAMPLES = SAMPLE_RATE // 10
MAX_SAMPLES = SAMPLE_RATE * 8

HIBARI_LICENSE = "Apache-2.0"
HIBARI_CREDIT = "hibari-tts (Apache-2.0), English voice of the package"


def speak(texts: list[str], cache: str | os.PathLike[str] | None = None) -> list[np.ndarray]:
    """English speech for each text, in order; the noise of the synthesiser is seeded, so a text has one sound.

    Args:
        texts: one utterance each.
        cache: as in :func:`omnimoe.data.sources.cache_folder`.

    Returns:
        One ``(samples,)`` int16 array a text, 16 kHz, silence trimmed, peak at -1 dB.

    Raises:
        SourceError: if hibari-tts is not installed.
    """
    try:
        import hibari
        import scipy.signal  # noqa: F401
    except ImportError as error:
        raise SourceError(
            f"{error.name} is not installed and speech is made with it: pip install 'omnimoe[data]'"
        ) from None
    folder = cache_folder(cache) / f"speech-hibari-{version('hibari-tts')}"
    folder.mkdir(exist_ok=True)
    voice = None
    clips = []
    for text in tqdm(texts, desc="speech", disable=None):
        path = folder / f"{hashlib.sha1(text.encode()).hexdigest()}.npy"
        if not path.exists():
            voice = voice or hibari.Hibari(threads=1)
            _save(path, to_clip(np.asarray(voice(text, seed=0)).ravel(), voice.sample_rate))
        clips.append(np.load(path))
    return clips


def read_clip(path: Path) -> np.ndarray:
    """A sound file in the corpus' form, see :func:`to_clip`.

    Raises:
        SourceError: if soundfile is not installed.
    """
    try:
        import soundfile
    except ImportError:
        raise SourceError(
            "soundfile is not installed and recordings are read with it: pip install 'omnimoe[data]'"
        ) from None
    wave, sample_rate = soundfile.read(path, dtype="float32")
    return to_clip(wave, sample_rate)


def to_clip(wave: np.ndarray, sample_rate: int) -> np.ndarray:
    """A recording in the corpus' form.

    Args:
        wave: ``(samples,)`` or ``(samples, channels)`` floating point.
        sample_rate: in Hz.

    Returns:
        ``(n,)`` int16, mono, 16 kHz, without leading and trailing silence, peak at -1 dB.
    """
    wave = np.asarray(wave, np.float32)
    wave = wave.mean(1) if wave.ndim > 1 else wave
    if sample_rate != SAMPLE_RATE:
        from scipy.signal import resample_poly

        divisor = np.gcd(sample_rate, SAMPLE_RATE)
        wave = resample_poly(wave, SAMPLE_RATE // divisor, sample_rate // divisor).astype(np.float32)
    frame = SAMPLE_RATE // 100
    frames = len(wave) // frame
    if frames > 4:
        energy = np.sqrt((wave[: frames * frame].reshape(frames, frame) ** 2).mean(1))
        loud = np.flatnonzero(energy > max(float(energy.max()) * 0.03, 1e-4))
        if len(loud):
            wave = wave[max(0, loud[0] - 5) * frame : min(frames, loud[-1] + 6) * frame]
    peak = max(float(np.abs(wave).max(initial=0.0)), 1e-4)
    return (wave / peak * 0.89 * 32767).astype(np.int16)


def _save(path: Path, clip: np.ndarray) -> None:
    partial = path.with_suffix(".partial.npy")
    np.save(partial, clip)
    partial.rename(path)

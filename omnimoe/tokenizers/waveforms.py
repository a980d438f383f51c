"""Clips of any rate to one channel at the rate that a tokenizer works at."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from omnimoe.tokenizers.base import TokenizerError

USUAL_RATE = 16_000
"""Hz of a clip whose rate is not said, at whatever rate a tokenizer works, so that one stands in for another."""

LARGEST_KERNEL = 20_000_000
"""Most numbers in the filter of a resampler, which grows with both rates over their greatest common divisor."""


def to_waveform(raw: Any, sample_rate: int, wanted: int) -> Tensor:
    """A clip at another rate.

    Args:
        raw: ``(n,)`` floating point in ``[-1, 1]``, or int16; one channel; an array, tensor or sequence.
        sample_rate: of ``raw`` in Hz.
        wanted: rate of the result in Hz.

    Returns:
        ``(ceil(n * wanted / sample_rate),)`` float32 on the CPU.

    Raises:
        TokenizerError: if ``raw`` is empty, has several channels, is not finite or lies out of range; if the rate is
            not a positive integer; or if the two rates have no common divisor worth the name.
    """
    waveform = torch.from_numpy(check_waveform(raw, sample_rate))
    if sample_rate == wanted:
        return waveform
    from torchaudio.functional import resample

    common = math.gcd(int(sample_rate), wanted)
    # The filter has one row for each step of the new rate, each at least one step of the old rate long.
    if (sample_rate // common) * (wanted // common) > LARGEST_KERNEL:
        raise TokenizerError(
            f"{sample_rate} Hz and {wanted} Hz share no divisor but {common}, so resampling would take gigabytes; "
            "is the rate right? Bring the clip to a usual rate first"
        )
    return resample(waveform, int(sample_rate), wanted)


def check_waveform(raw: Any, sample_rate: int) -> np.ndarray:
    """``raw`` as ``(n,)`` float32 in ``[-1, 1]``; int16 is scaled.

    Raises:
        TokenizerError: see :func:`to_waveform`.
    """
    if isinstance(sample_rate, bool) or not isinstance(sample_rate, int | np.integer) or sample_rate < 1:
        raise TokenizerError(f"sample_rate must be a positive integer in Hz, got {sample_rate!r}")
    if isinstance(raw, str | bytes):
        raise TokenizerError(f"speech is a waveform, not {str(raw)[:60]!r}; read the file first")
    try:
        waveform = raw.detach().cpu().float().numpy() if _is_low_precision(raw) else np.asarray(raw)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TokenizerError(f"speech must be an array of samples, not {type(raw).__name__}: {error}") from None
    if waveform.dtype == np.int16:
        waveform = waveform.astype(np.float32) / 32768
    if waveform.ndim != 1:
        raise TokenizerError(f"speech must be one channel, (n,), not {waveform.shape}; average the channels first")
    if not waveform.size:
        raise TokenizerError("speech needs at least one sample, got none")
    if not np.issubdtype(waveform.dtype, np.floating):
        raise TokenizerError(f"samples must be floating point in [-1, 1] or int16, not {waveform.dtype}")
    if not np.isfinite(waveform).all():
        raise TokenizerError(f"{int((~np.isfinite(waveform)).sum())} of {waveform.size} samples are NaN or infinite")
    # Resampling and lossy formats overshoot a little; a factor of two is a clip in other units.
    if np.abs(waveform).max() > 2:
        raise TokenizerError(f"samples must lie in [-1, 1], got up to {np.abs(waveform).max():g}; divide by full scale")
    return np.ascontiguousarray(waveform, dtype=np.float32).clip(-1, 1)


def _is_low_precision(raw: Any) -> bool:
    return isinstance(raw, Tensor) and (raw.is_floating_point() or raw.requires_grad)

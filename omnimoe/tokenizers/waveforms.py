"""Clips of any rate to one channel at the rate that a tokenizer works at."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from omnimoe.tokenizers.base import TokenizerError
from omnimoe.tokenizers.speech import check_waveform

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

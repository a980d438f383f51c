from __future__ import annotations

import numpy as np
import pytest
import torch
from torchaudio.functional import resample

from omnimoe.tokenizers import TokenizerError, load_tokenizer
from omnimoe.tokenizers.waveforms import to_waveform
from tests.tokenizers.adapted import read_clip


def test_the_wanted_rate_is_left_as_it_is():
    clip = read_clip()
    assert torch.equal(to_waveform(clip, 16_000, 16_000), torch.from_numpy(clip.astype(np.float32) / 32768))


@pytest.mark.parametrize("rate", [8_000, 22_050, 24_000, 44_100, 48_000, np.int64(44_100)])
def test_usual_rates_are_resampled(rate):
    clip = torch.from_numpy(read_clip().astype(np.float32) / 32768)
    made = to_waveform(clip, rate, 16_000)
    assert torch.equal(made, resample(clip, int(rate), 16_000))
    assert len(made) == -(-len(clip) * 16_000 // int(rate))


@pytest.mark.parametrize("rate", [44_099, 1_000_003, 2**40 + 1])
def test_a_rate_whose_filter_would_take_gigabytes_is_refused(rate):
    with pytest.raises(TokenizerError, match=f"{rate} Hz and 16000 Hz share no divisor but 1"):
        to_waveform(np.zeros(100, np.float32), rate, 16_000)
    with pytest.raises(TokenizerError, match="share no divisor"):
        load_tokenizer("speech").encode(np.zeros(100, np.float32), sample_rate=rate)

from __future__ import annotations

import wave
from pathlib import Path

import numpy as np
import pytest
import torch

from omnimoe.config import ConfigError
from omnimoe.tokenizers import TokenizerError, load_tokenizer
from omnimoe.tokenizers.codec import WEIGHTS
from omnimoe.tokenizers.speech import SAMPLE_RATE, SpeechTokenizer, to_peak

CLIPS = sorted((Path(__file__).parents[1] / "fixtures" / "speech").glob("*.wav"))


def read(path: Path) -> np.ndarray:
    with wave.open(str(path), "rb") as file:
        assert file.getframerate() == SAMPLE_RATE
        return np.frombuffer(file.readframes(file.getnframes()), "<i2").astype(np.float32) / 32768


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer("speech")


def log_mel(tokenizer: SpeechTokenizer, waveform: np.ndarray) -> torch.Tensor:
    spectrum = tokenizer.network.spectrum
    return spectrum.log_mel(spectrum.magnitudes(to_peak(torch.from_numpy(waveform))[None]))[0]


def test_the_shipped_tokenizer_says_what_it_is(tokenizer):
    assert isinstance(tokenizer, SpeechTokenizer)
    assert tokenizer.vocab_size == 1000
    assert tokenizer.num_tokens is None
    assert tokenizer.grid is None
    assert tokenizer.units_per_second == 25
    assert (WEIGHTS / tokenizer.shipped).stat().st_size < 6 * 2**20


@pytest.mark.parametrize("path", CLIPS, ids=lambda path: path.stem)
def test_unheard_clips_come_back(tokenizer, path):
    clip = read(path)
    ids = tokenizer.encode(clip)
    assert ids.shape == (-(-len(clip) // 640),)
    assert ids.dtype == torch.int64
    assert ids.min() >= 0
    assert ids.max() < tokenizer.vocab_size
    assert len(ids.unique()) > len(ids) // 3
    made = tokenizer.decode(ids)
    assert made.shape == (640 * len(ids),)
    assert made.dtype == np.float32
    assert np.abs(made).max() <= 1
    whole = np.pad(clip, (0, len(made) - len(clip)))
    error = (log_mel(tokenizer, made) - log_mel(tokenizer, whole)).abs().mean()
    silence = log_mel(tokenizer, np.zeros_like(made))
    assert error < 0.2 * (silence - log_mel(tokenizer, whole)).abs().mean()


def test_the_same_input_gives_the_same_output(tokenizer):
    clip = read(CLIPS[0])
    ids = tokenizer.encode(clip)
    assert torch.equal(tokenizer.encode(clip), ids)
    assert np.array_equal(tokenizer.decode(ids), tokenizer.decode(ids.tolist()))


def test_ids_can_be_trained_on(tokenizer):
    embedding = torch.nn.Embedding(tokenizer.vocab_size, 2)
    embedding(tokenizer.encode(read(CLIPS[0]))).sum().backward()
    assert embedding.weight.grad is not None


def test_decoding_leaves_the_random_state_alone(tokenizer):
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    tokenizer.decode([1, 2, 3])
    assert torch.equal(torch.rand(1), expected)


def test_every_kind_of_input_gives_the_same_ids(tokenizer):
    clip = read(CLIPS[0])
    expected = tokenizer.encode(clip)
    for raw in (torch.from_numpy(clip), clip.astype(np.float64), clip.tolist(), (clip * 32768).astype(np.int16)):
        assert torch.equal(tokenizer.encode(raw), expected)


def test_loudness_is_not_coded(tokenizer):
    clip = read(CLIPS[0])
    assert (tokenizer.encode(clip) == tokenizer.encode(0.25 * clip)).float().mean() > 0.98


def test_another_rate_is_resampled(tokenizer):
    from torchaudio.functional import resample

    clip = torch.from_numpy(read(CLIPS[0]))
    ids = tokenizer.encode(resample(clip, 16_000, 48_000), sample_rate=48_000)
    expected = tokenizer.encode(clip)
    assert abs(len(ids) - len(expected)) <= 1
    length = min(len(ids), len(expected))
    assert (ids[:length] == expected[:length]).float().mean() > 0.5


@pytest.mark.parametrize("length", [1, 639, 640, 641])
def test_short_clips_fill_whole_units(tokenizer, length):
    ids = tokenizer.encode(np.full(length, 0.1, np.float32))
    assert len(ids) == -(-length // 640)
    assert len(tokenizer.decode(ids)) == 640 * len(ids)


def test_silence_stays_quiet(tokenizer):
    made = tokenizer.decode(tokenizer.encode(np.zeros(16_000, np.float32)))
    assert np.isfinite(made).all()
    assert np.abs(made).max() < 0.05


def test_no_ids_are_no_sound(tokenizer):
    assert tokenizer.decode([]).shape == (0,)


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (np.zeros(0, np.float32), "at least one sample"),
        (np.array([0.0, np.nan], np.float32), "1 of 2 samples are NaN"),
        (np.array([0.0, np.inf], np.float32), "NaN or infinite"),
        (np.zeros((2, 100), np.float32), "one channel"),
        (np.array([0.0, 3000.0], np.float32), "divide by full scale"),
        (np.zeros(10, np.int64), "floating point"),
        ("speech.wav", "read the file first"),
        (None, "one channel|floating point"),
        ([[0.1], [0.2, 0.3]], "array of samples"),
    ],
)
def test_what_is_no_speech_is_refused(tokenizer, raw, message):
    with pytest.raises(TokenizerError, match=message):
        tokenizer.encode(raw)


@pytest.mark.parametrize("rate", [0, -16_000, 16_000.0, "16000", True, None])
def test_what_is_no_rate_is_refused(tokenizer, rate):
    with pytest.raises(TokenizerError, match="positive integer in Hz"):
        tokenizer.encode(np.zeros(100, np.float32), sample_rate=rate)


@pytest.mark.parametrize(
    ("ids", "message"),
    [([1000], r"0\.\.999"), ([-1], r"0\.\.999"), ([0.5], "integers"), ([[1, 2]], "one clip"), (None, "integers")],
)
def test_what_are_no_ids_is_refused(tokenizer, ids, message):
    with pytest.raises(TokenizerError, match=message):
        tokenizer.decode(ids)


def test_saved_and_read_it_is_the_same(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["speech_tokenizer.safetensors"]
    again = SpeechTokenizer.from_pretrained(tmp_path)
    assert again.config == tokenizer.config
    clip = read(CLIPS[0])
    assert torch.equal(again.encode(clip), tokenizer.encode(clip))


def test_a_small_network_at_another_rate_works():
    config = SpeechTokenizer.Config(
        frames_per_unit=2, hidden_size=16, encoder_blocks=1, decoder_blocks=1, frame_blocks=1, levels=(5, 5)
    )
    tokenizer = config.build()
    assert (tokenizer.vocab_size, tokenizer.units_per_second) == (25, 50)
    ids = tokenizer.encode(read(CLIPS[0])[:3200])
    assert len(ids) == 10
    assert tokenizer.decode(ids).shape == (3200,)


@pytest.mark.parametrize("change", [{"hop": 320}, {"hop": 0}, {"hidden_size": 15}, {"frames_per_unit": 0}])
def test_a_config_that_cannot_be_built_is_refused(change):
    with pytest.raises(ConfigError, match="got"):
        SpeechTokenizer.Config().replace(**change).build()


def test_griffin_lim_finds_phases_of_a_real_clip(tokenizer):
    spectrum = tokenizer.network.spectrum
    clip = torch.from_numpy(read(CLIPS[1]))
    clip = clip[: len(clip) // 640 * 640][None]
    magnitudes = spectrum.magnitudes(clip)
    error = (spectrum.magnitudes(spectrum.waveforms(magnitudes)) - magnitudes).norm() / magnitudes.norm()
    assert error < 0.25

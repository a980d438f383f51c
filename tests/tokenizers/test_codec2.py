"""Codec 2 run for real: its bits as ids, and the sound of its own command."""

from __future__ import annotations

import builtins
import shutil
import subprocess

import numpy as np
import pytest
import torch
from torchaudio.functional import resample

from omnimoe.config import ConfigError
from omnimoe.tokenizers import TokenizerError, load_tokenizer
from omnimoe.tokenizers.codec2 import FIELDS
from tests.tokenizers.adapted import read_clip

pycodec2 = pytest.importorskip("pycodec2", reason="needs pycodec2, the extra 'codec2'")


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer("codec2")


@pytest.fixture(scope="module")
def clip() -> np.ndarray:
    """16 kHz, about a second."""
    return read_clip()


@pytest.fixture(scope="module")
def slow_clip(clip) -> np.ndarray:
    """The same at the codec's rate, whole frames of it, int16."""
    waveform = resample(torch.from_numpy(clip.astype(np.float32) / 32768), 16_000, 8_000).clamp(-1, 1)
    samples = (waveform.numpy() * 32767).round().astype(np.int16)
    return samples[: len(samples) // 320 * 320]


def envelope(waveform: np.ndarray, hop: int = 320) -> np.ndarray:
    frames = waveform[: len(waveform) // hop * hop].reshape(-1, hop)
    return np.sqrt(np.square(frames.astype(np.float64)).mean(1))


def fit(made: np.ndarray, real: np.ndarray) -> float:
    """The best correlation of two envelopes over delays of up to 80 ms."""
    length = min(len(made), len(real)) // 320 * 320
    delays = range(0, 641, 80)
    return max(np.corrcoef(envelope(made[d:length]), envelope(real[: length - d]))[0, 1] for d in delays)


def test_it_says_what_it_is(tokenizer):
    assert tokenizer.codebook_sizes == (512, 512, 16, 64)
    assert tokenizer.vocab_size == 1104
    assert tokenizer.units_per_second == 100
    assert (tokenizer.sample_rate, tokenizer.modality, tokenizer.num_tokens) == (8000, "speech", None)


def test_a_clip_gives_four_ids_for_forty_milliseconds(tokenizer, clip):
    ids = tokenizer.encode(clip, sample_rate=16_000)
    assert ids.dtype == torch.int64
    assert len(ids) == 4 * -(-len(clip) // 640)
    # A clip is at 16 kHz unless its rate is said.
    assert torch.equal(tokenizer.encode(clip), ids)
    for field, (low, high) in enumerate([(0, 512), (512, 1024), (1024, 1040), (1040, 1104)]):
        held = ids[field::4]
        assert low <= held.min() <= held.max() < high
        assert len(held.unique()) > 3


def test_what_comes_back_is_the_speech_that_went_in(tokenizer, clip):
    made = tokenizer.decode(tokenizer.encode(clip, sample_rate=16_000))
    assert made.dtype == np.float32
    assert len(made) == 320 * -(-len(clip) // 640)
    assert np.abs(made).max() <= 1
    real = resample(torch.from_numpy(clip.astype(np.float32) / 32768), 16_000, 8_000).numpy()
    # Loud and soft fall together, after a delay of up to two frames; backwards they do so less.
    assert fit(made, real) > 0.65
    assert fit(made[::-1], real) < 0.5


@pytest.mark.parametrize("mode", FIELDS)
def test_ids_are_the_bits_of_the_library(mode, slow_clip):
    tokenizer = load_tokenizer("codec2", mode=mode)
    codec = pycodec2.Codec2(int(mode.rstrip("C")))
    size = codec.samples_per_frame()
    sent = [codec.encode(frame) for frame in slow_clip.reshape(-1, size)]
    codes = tokenizer.encode_codes(slow_clip, 8_000)
    assert codes.shape == (len(FIELDS[mode]), len(sent))
    for frame, data in enumerate(sent):
        bits = "".join(f"{int(code):0{width}b}" for code, width in zip(codes[:, frame], FIELDS[mode], strict=True))
        assert bits.ljust(8 * len(data), "0") == "".join(f"{byte:08b}" for byte in data)
    assert tokenizer.units_per_second == 8000 / size * len(FIELDS[mode])
    assert len(tokenizer.decode(tokenizer.encode(slow_clip, 8_000))) == len(slow_clip)


@pytest.mark.skipif(shutil.which("c2enc") is None, reason="needs the commands of Codec 2 (Debian package codec2)")
@pytest.mark.parametrize("mode", ["700C", "1200", "3200"])
def test_ids_and_sound_are_those_of_the_commands(mode, slow_clip, tmp_path):
    raw, sent, made = (tmp_path / name for name in ("in.raw", "bits", "out.raw"))
    raw.write_bytes(slow_clip.tobytes())
    subprocess.run(["c2enc", mode, str(raw), str(sent)], check=True, capture_output=True)
    subprocess.run(["c2dec", mode, str(sent), str(made)], check=True, capture_output=True)
    tokenizer = load_tokenizer("codec2", mode=mode)
    ids = tokenizer.encode(slow_clip, 8_000)
    size = -(-sum(FIELDS[mode]) // 8)
    frames = np.frombuffer(sent.read_bytes(), np.uint8).reshape(-1, size)
    assert len(ids) == len(frames) * len(FIELDS[mode])
    assert np.array_equal(tokenizer.decode(ids), np.frombuffer(made.read_bytes(), np.int16).astype(np.float32) / 32768)


def test_the_same_input_gives_the_same_output(tokenizer, clip):
    ids = tokenizer.encode(clip, sample_rate=16_000)
    assert torch.equal(tokenizer.encode(clip, sample_rate=16_000), ids)
    # The library itself does not repeat: its noise goes on from where the last clip left it.
    first = tokenizer.decode(ids)
    codec = pycodec2.Codec2(700)
    codec.decode(codec.encode(np.zeros(320, np.int16)))
    assert np.array_equal(tokenizer.decode(ids.tolist()), first)


def test_loudness_is_coded(tokenizer, clip):
    soft = tokenizer.decode(tokenizer.encode((clip * 0.1).astype(np.int16), sample_rate=16_000))
    loud = tokenizer.decode(tokenizer.encode(clip, sample_rate=16_000))
    assert envelope(soft).mean() < 0.25 * envelope(loud).mean()


def test_silence_is_quiet_and_repeats(tokenizer):
    codes = tokenizer.encode_codes(np.zeros(8000, np.float32))
    assert (codes == codes[:, :1]).all()
    assert codes[2, 0] == 0
    assert np.abs(tokenizer.decode_codes(codes)).max() < 0.01


@pytest.mark.parametrize("length", [1, 319, 320, 321])
def test_short_clips_fill_whole_frames(tokenizer, length):
    ids = tokenizer.encode(np.full(length, 0.1, np.float32), 8_000)
    assert len(ids) == 4 * -(-length // 320)
    assert len(tokenizer.decode(ids)) == 320 * -(-length // 320)


def test_ids_that_form_no_frame_are_left_out(tokenizer, clip, caplog):
    ids = tokenizer.encode(clip, sample_rate=16_000)
    with caplog.at_level("WARNING"):
        cut = tokenizer.decode(ids[:-1])
    assert np.array_equal(cut, tokenizer.decode(ids[:-4]))
    assert f"3 of {len(ids) - 1} ids" in caplog.text
    assert tokenizer.decode([]).shape == (0,)


def test_saved_and_read_it_is_the_same(tmp_path, clip):
    tokenizer = load_tokenizer("codec2", mode="1200")
    tokenizer.save_pretrained(tmp_path)
    again = load_tokenizer("codec2", tmp_path)
    assert again.config.mode == "1200"
    assert torch.equal(again.encode(clip), tokenizer.encode(clip))


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (np.zeros(0, np.float32), "at least one sample"),
        (np.array([0.0, np.nan], np.float32), "1 of 2 samples are NaN"),
        (np.zeros((2, 100), np.float32), "one channel"),
        (np.array([0.0, 3000.0], np.float32), "divide by full scale"),
        ("speech.wav", "read the file first"),
    ],
)
def test_what_is_no_speech_is_refused(tokenizer, raw, message):
    with pytest.raises(TokenizerError, match=message):
        tokenizer.encode(raw)


@pytest.mark.parametrize("rate", [0, -8000, 8000.0, "8000", None])
def test_what_is_no_rate_is_refused(tokenizer, rate):
    with pytest.raises(TokenizerError, match="positive integer in Hz"):
        tokenizer.encode(np.zeros(100, np.float32), sample_rate=rate)


@pytest.mark.parametrize(
    ("ids", "message"), [([1104], r"0\.\.1103"), ([-1], r"0\.\.1103"), ([0.5], "integers"), ([[0, 512]], "one clip")]
)
def test_what_are_no_ids_is_refused(tokenizer, ids, message):
    with pytest.raises(TokenizerError, match=message):
        tokenizer.decode(ids)


def test_an_unknown_mode_is_refused():
    with pytest.raises(ConfigError, match="mode must be one of 700C, .* got '450'"):
        load_tokenizer("codec2", mode="450")


def test_a_missing_library_is_named_with_its_extra(monkeypatch):
    real = builtins.__import__

    def without_pycodec2(name, *arguments, **options):
        if name == "pycodec2":
            raise ImportError("No module named 'pycodec2'")
        return real(name, *arguments, **options)

    monkeypatch.setattr(builtins, "__import__", without_pycodec2)
    with pytest.raises(TokenizerError, match=r"pip install 'omnimoe\[codec2\]'"):
        load_tokenizer("codec2")

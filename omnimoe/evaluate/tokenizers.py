"""What is lost on the way to tokens and back."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from PIL import Image

from omnimoe.evaluate.base import Measure, NotRunError, register_metric
from omnimoe.evaluate.bench import Bench
from omnimoe.evaluate.statistics import Z95, psnr, ssim
from omnimoe.tokenizers import Tokenizer
from omnimoe.tokenizers.speech import SAMPLE_RATE

COLUMN = "round trip"
SHOWN = 12
"""Pictures on the contact sheet."""
FLOOR = 1e-5
"""Least power of a mel band that counts."""


@register_metric("tokenizers")
def tokenizers(bench: Bench) -> Iterator[Measure]:
    """What the tokenizers lose: held-out pictures and clips, encoded and decoded, against the originals.

    One picture and one clip of each concept. No model takes part.
    """
    if bench.raw is None:
        raise NotRunError(
            "a round trip starts at the pictures and clips themselves, and a token corpus holds ids only; pass "
            "--raw DIR, the folder that 'omnimoe data build' wrote"
        )
    yield from _pictures(bench)
    yield from _clips(bench)


def _pictures(bench: Bench) -> Iterator[Measure]:
    from omnimoe.plots import draw_grid

    examples = bench.concepts("image")
    tokenizer = bench.tokenizer("image")
    real = [bench.picture(example) for example in examples]
    again = [tokenizer.decode(tokenizer.encode(picture)) for picture in bench.progress(real, "pictures, round trip")]
    fitted = [fit(picture, other) for picture, other in zip(real, again, strict=True)]
    pairs = list(zip(fitted, again, strict=True))
    yield mean(COLUMN, "pictures, PSNR", [psnr(*pair) for pair in pairs], unit="dB", better="higher")
    yield mean(COLUMN, "pictures, SSIM", [ssim(*pair) for pair in pairs], better="higher")
    codes = np.concatenate([np.asarray(tokenizer.encode(picture)).ravel() for picture in real])
    yield Measure(
        of=COLUMN,
        name="pictures, codes in use",
        value=len(np.unique(codes)) / tokenizer.vocab_size,
        unit="share",
        count=len(codes),
        detail=True,
    )
    bench.sheet(
        "tokenizers",
        "pictures above, what comes back from their tokens below",
        lambda path: draw_grid(
            [fitted[:SHOWN], again[:SHOWN]],
            path,
            headings=["original", "decoded"],
            captions=[bench.caption(example) for example in examples[:SHOWN]],
        ),
    )


def _clips(bench: Bench) -> Iterator[Measure]:
    if bench.raw is None or not len(bench.corpus.select(bench.split, having=("speech",))):
        bench.note(f"Split {bench.split} has no clips.")
        return
    tokenizer = bench.tokenizer("speech")
    errors = []
    for example in bench.progress(bench.concepts("speech"), "clips, round trip"):
        clip = bench.raw.clip(example.index)
        if clip is not None:
            errors.append(mel_distance(clip, at_16k(tokenizer.decode(tokenizer(clip, SAMPLE_RATE).ids), tokenizer)))
    yield mean(COLUMN, "speech, mel distance", errors, unit="nats", better="lower")


def mel_distance(waveform: np.ndarray, other: np.ndarray) -> float:
    """Mean absolute difference of the log-mel spectra of two clips of one speech, at equal loudness.

    Windows of 25 ms, steps of 10 ms, 80 bands from 20 Hz to 8 kHz, natural logarithm of the power, floored at 1e-5 of
    a sine of full scale. Both clips are set to one peak level first, and the longer one is cut.

    Args:
        waveform: ``(n,)`` floating point at 16 kHz.
        other: ``(m,)`` at the same rate.

    Returns:
        The distance in nats.
    """
    length = min(len(waveform), len(other))
    one, two = (_log_mel(held[:length]) for held in (waveform, other))
    return float((one - two).abs().mean())


def _log_mel(waveform: np.ndarray) -> torch.Tensor:
    from torchaudio.functional import melscale_fbanks

    held = torch.from_numpy(np.ascontiguousarray(waveform, dtype=np.float32))
    held = held / held.abs().amax().clamp_min(1e-6)
    window = torch.hann_window(400)
    # a sine of full scale has power 1 in its bin
    power = torch.stft(held, 400, 160, window=window, center=True, pad_mode="constant", return_complex=True)
    power = (2 * power / window.sum()).abs().square()
    bands = melscale_fbanks(201, 20.0, SAMPLE_RATE / 2, 80, SAMPLE_RATE)
    return (power.T @ bands).clamp_min(FLOOR).log()


def at_16k(waveform: np.ndarray, tokenizer: Tokenizer) -> np.ndarray:
    """What a tokenizer decoded, at 16 kHz."""
    if tokenizer.sample_rate in (None, SAMPLE_RATE):
        return waveform
    from torchaudio.functional import resample

    return resample(torch.from_numpy(waveform), tokenizer.sample_rate, SAMPLE_RATE).numpy()


def fit(picture: np.ndarray, other: np.ndarray) -> np.ndarray:
    """A picture at the size of another, where they differ."""
    if picture.shape == other.shape:
        return picture
    size = (other.shape[1], other.shape[0])
    return np.asarray(Image.fromarray(picture).resize(size, Image.Resampling.LANCZOS), np.uint8)


def mean(of: str, name: str, values: Sequence[float], *, unit: str = "", better: str | None = None) -> Measure:
    """A mean with the 95 % interval that the spread of the values gives."""
    middle = statistics.fmean(values)
    half = Z95 * statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else 0.0
    return Measure(
        of=of,
        name=name,
        value=middle,
        unit=unit,
        better=better,
        low=middle - half,
        high=middle + half,
        count=len(values),
    )

"""What is lost on the way to tokens and back."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from PIL import Image

from omnimoe.evaluate.base import Measure, register_metric
from omnimoe.evaluate.bench import Bench, at_16k
from omnimoe.evaluate.statistics import Z95, psnr, ssim
from omnimoe.generate import Generated
from omnimoe.tokenizers.speech import SAMPLE_RATE

COLUMN, SECOND = "round trip", "second round trip"
SHOWN = 12
"""Pictures on the contact sheet."""
HEARD = 6
"""Clips that are written, each as it was and as it comes back."""
FLOOR = 1e-5
"""Least power of a mel band that counts."""


@register_metric("tokenizers")
def tokenizers(bench: Bench) -> Iterator[Measure]:
    """What the tokenizers lose: held-out pictures and clips, encoded and decoded, against the originals.

    One picture and one clip of each concept. No model takes part. Without a raw folder the originals are not at hand,
    and what their ids decode to takes their place: a second round trip, which loses less than the first.
    """
    of = COLUMN
    if bench.raw is None:
        of = SECOND
        bench.note(
            "No raw folder: these are round trips of what the ids of the corpus decode to, which lose less than those "
            "of originals. Pass --raw DIR, the folder that 'omnimoe data build' wrote, to measure the tokenizers."
        )
    for what, measure in (("image", _pictures), ("speech", _clips)):
        if len(bench.rows(what)):
            yield from measure(bench, of)
        else:
            bench.note(f"Split {bench.split} has no {what}.")


def _pictures(bench: Bench, of: str) -> Iterator[Measure]:
    from omnimoe.plots import draw_grid

    examples = bench.concepts("image")
    tokenizer = bench.tokenizer("image")
    real = [bench.picture(example) for example in examples]
    codes = [tokenizer.encode(picture) for picture in bench.progress(real, "pictures to codes")]
    again = [tokenizer.decode(ids) for ids in bench.progress(codes, "codes to pictures")]
    fitted = [fit(picture, other) for picture, other in zip(real, again, strict=True)]
    pairs = list(zip(fitted, again, strict=True))
    yield mean(of, "pictures, PSNR", [psnr(*pair) for pair in pairs], unit="dB", better="higher")
    yield mean(of, "pictures, SSIM", [ssim(*pair) for pair in pairs], better="higher")
    used = np.unique(np.concatenate([np.asarray(ids).ravel() for ids in codes]))
    yield Measure(
        of=of,
        name="pictures, codes in use",
        value=len(used) / tokenizer.vocab_size,
        unit="share",
        count=len(pairs),
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


def _clips(bench: Bench, of: str) -> Iterator[Measure]:
    tokenizer = bench.tokenizer("speech")
    errors = []
    for place, example in enumerate(bench.progress(bench.concepts("speech"), "clips, round trip"), 1):
        clip = bench.clip(example)
        again = at_16k(tokenizer.decode(tokenizer(clip, SAMPLE_RATE).ids), tokenizer)
        errors.append(mel_distance(clip, again))
        if place <= HEARD:
            for name, sound in (("original", clip), ("decoded", again)):
                made = Generated(modality="speech", raw=sound, sample_rate=SAMPLE_RATE)
                bench.sound(f"tokenizers-{place}-{name}", f"{bench.caption(example)}: {name}", made)
    yield mean(of, "speech, mel distance", errors, unit="nats", better="lower")


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

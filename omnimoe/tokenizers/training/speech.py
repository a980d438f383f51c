"""Trains the speech tokenizer: ``python -m omnimoe.tokenizers.training.speech --corpus DIR --out FILE``.

Only clips of the train split are heard. The loss is L1 between log magnitudes, which weighs loud and soft frames alike,
and between log-mel features, which weighs frequencies as an ear does.
"""

from __future__ import annotations

import json
import logging
import random
import sys
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from omnimoe.tokenizers.speech import FLOOR, SAMPLE_RATE, SpeechAutoencoder, SpeechTokenizer, to_peak
from omnimoe.tokenizers.training.common import (
    epochs,
    fit,
    indices_by_split,
    parser,
    prepare,
)

logger = logging.getLogger(__name__)

_CROP_UNITS = 32


def read_clips(corpus: Path, indices: list[int]) -> list[Tensor]:
    """Clips of ``audio.npy`` as ``(n,)`` float32 at one peak level."""
    audio = np.load(corpus / "audio.npy", mmap_mode="r")
    offsets = np.load(corpus / "audio_offsets.npy")
    return [
        to_peak(torch.from_numpy(np.array(audio[offsets[i] : offsets[i + 1]])).float() / 32768)
        for i in indices
        if offsets[i + 1] > offsets[i]
    ]


def speak(corpus: Path, count: int, seed: int) -> list[Tensor]:
    """Clips of ``count`` glosses of the train split, spoken by the voice of the corpus; ``hibari-tts`` makes them.

    Labels are short and alike; running text brings the sounds and joins of words that labels lack.
    """
    import hibari
    from torchaudio.functional import resample

    with open(corpus / "text.jsonl", encoding="utf-8") as lines:
        rows = [row for row in map(json.loads, lines) if row["source"] == "wordnet" and row["split"] == "train"]
    voice, clips = hibari.Hibari(), []
    for row in random.Random(seed).sample(rows, min(count, len(rows))):
        waveform = torch.from_numpy(np.asarray(voice(row["text"][:160]), np.float32))
        clips.append(to_peak(resample(waveform, 24_000, SAMPLE_RATE)))
    return clips


def crop(clip: Tensor, length: int, generator: torch.Generator) -> Tensor:
    """``length`` samples at a random place; a shorter clip comes at a random place in silence."""
    slack = len(clip) - length
    start = int(torch.randint(abs(slack) + 1, (), generator=generator))
    if slack >= 0:
        return clip[start : start + length]
    return torch.nn.functional.pad(clip, (start, -slack - start))


def spectral_loss(network: SpeechAutoencoder, made: Tensor, magnitudes: Tensor) -> Tensor:
    """L1 of log magnitudes and, twice as heavy, of log-mel features."""
    made = made.float()
    fine = (made - magnitudes.clamp_min(FLOOR).log()).abs().mean()
    mel = (network.spectrum.log_mel(made.exp()) - network.spectrum.log_mel(magnitudes)).abs().mean()
    return fine + 2 * mel


@torch.inference_mode()
def evaluate(network: SpeechAutoencoder, clips: list[Tensor], samples_per_unit: int) -> dict[str, float]:
    """Mean absolute error of log-mel features over all frames of ``clips``, and how many units they use."""
    error, frames, used = 0.0, 0, set()
    device = next(network.parameters()).device
    for clip in clips:
        clip = torch.nn.functional.pad(clip, (0, -len(clip) % samples_per_unit)).to(device)
        magnitudes = network.spectrum.magnitudes(clip[None])
        made, ids = network(magnitudes)
        difference = network.spectrum.log_mel(made.exp()) - network.spectrum.log_mel(magnitudes)
        error += difference.abs().mean(-1).sum().item()
        frames += difference.shape[1]
        used.update(ids.unique().tolist())
    return {"mel_l1": error / max(frames, 1), "units": len(used)}


def train(options) -> dict[str, dict[str, float]]:
    """Trains, writes ``options.out`` and returns the figures of each split."""
    prepare(options.seed)
    splits = indices_by_split(options.corpus, "audio")
    clips = {split: read_clips(options.corpus, indices) for split, indices in splits.items()}
    clips["train"] += speak(options.corpus, options.glosses, options.seed)
    config = SpeechTokenizer.Config(frames_per_unit=options.frames_per_unit)
    tokenizer = SpeechTokenizer(config)
    network = tokenizer.network.train().requires_grad_(True).to(options.device)
    minutes = {split: round(sum(map(len, of)) / SAMPLE_RATE / 60, 1) for split, of in clips.items()}
    logger.info("minutes of speech: %s", minutes)
    generator = torch.Generator().manual_seed(options.seed)
    length = tokenizer.samples_per_unit * _CROP_UNITS * 4 // options.frames_per_unit

    def loss_of(batch: Tensor) -> Tensor:
        waveforms = torch.stack([crop(clips["train"][i], length, generator) for i in batch.tolist()])
        magnitudes = network.spectrum.magnitudes(waveforms.to(options.device))
        with torch.autocast(magnitudes.device.type, torch.bfloat16):
            made, _ = network(magnitudes)
        return spectral_loss(network, made, magnitudes)

    average = fit(
        network,
        epochs(list(range(len(clips["train"]))), options.batch_size, generator),
        loss_of,
        options,
        evaluate=lambda averaged: evaluate(averaged, clips["val"][:64], tokenizer.samples_per_unit),
    )
    tokenizer = SpeechTokenizer(config)
    tokenizer.network.load_state_dict(average.state_dict())
    tokenizer.save_pretrained(options.out)
    # Figures are those of the file as stored, in float16, not of the weights in memory.
    network = SpeechTokenizer.from_pretrained(options.out).network.to(options.device)
    figures = {split: evaluate(network, of[:1000], tokenizer.samples_per_unit) for split, of in clips.items() if of}
    logger.info("%s", figures)
    return figures


def main(arguments: list[str] | None = None) -> int:
    """Reads the command line and trains."""
    options = parser(__doc__.splitlines()[0], steps=8000, batch_size=32, learning_rate=1.5e-3)
    options.add_argument("--frames-per-unit", type=int, default=4, help="10 ms frames of a unit (%(default)s)")
    options.add_argument("--glosses", type=int, default=1500, help="glosses spoken and added to train (%(default)s)")
    train(options.parse_args(arguments))
    return 0


if __name__ == "__main__":
    sys.exit(main())

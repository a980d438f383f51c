"""Generated speech, as a recogniser hears it."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

import numpy as np

from omnimoe.evaluate.base import Measure, register_metric
from omnimoe.evaluate.bench import Bench, at_16k
from omnimoe.evaluate.pictures import load_encoder_or_not_run
from omnimoe.evaluate.statistics import Z95, wilson, word_errors
from omnimoe.tokenizers.speech import SAMPLE_RATE

ENCODER = "whisper_tiny"
ORIGINAL, DECODED = "original", "decoded"
TEN = 10
PLAIN = re.compile(r"[a-z]+( [a-z]+)?")
"""Captions that are spoken: one or two words in small letters, no names or signs."""
SHARE = 4
"""Concepts for each clip that is generated and heard, which costs more than anything else here."""
SHOWN = 5
"""Clips kept of each model."""


@register_metric("speech")
def speech(bench: Bench) -> Iterator[Measure]:
    """Held-out words spoken by the models, as Whisper tiny.en hears them.

    A caption is heard right if the transcript is it to the word, both normalised. The ceilings are the original clips
    and what comes back from their tokens.
    """
    recogniser = load_encoder_or_not_run(ENCODER, bench)
    speakers = {of: model for of, model in bench.models.items() if "speech" in bench.modalities(model)}
    told = [(example, bench.caption(example)) for example in bench.concepts("text", "speech", num=None)]
    plain = [(example, caption) for example, caption in told if PLAIN.fullmatch(caption)]
    if len(plain) < TEN:
        bench.note(f"Only {len(plain)} captions are plain words, so all captions are spoken.")
    told = plain if len(plain) >= TEN else told
    if bench.num is not None:
        told = told[: max(TEN, bench.num // SHARE)]
    asked, captions = [example for example, _ in told], [caption for _, caption in told]
    clips: dict[str, list[np.ndarray]] = {}
    if bench.raw is None:
        bench.note("No raw folder: the original clips are not at hand, so there is no ceiling from them.")
    else:
        clips[ORIGINAL] = [bench.clip(example) for example in asked]
    clips[DECODED] = [bench.spoken(example) for example in asked]
    for of, model in speakers.items():
        made = bench.generate(model, [[("text", caption)] for caption in captions], "speech", what=f"{of}: speaking")
        clips[of] = [at_16k(spoken.raw, bench.tokenizer("speech")) for spoken in made]
        for place, spoken in enumerate(made[:SHOWN]):
            bench.sound(f"speech-{of}-{place + 1}", f"{of}: {captions[place]}", spoken)
    for of, held in clips.items():
        heard: list[str] = []
        for start in bench.progress(range(0, len(held), bench.batch_size), f"{of}: hearing"):
            heard += recogniser.transcribe(held[start : start + bench.batch_size], SAMPLE_RATE)
        yield from scored(of, heard, captions)
        bench.note(
            f"{of} heard as: " + "; ".join(f"{a!r} for {b!r}" for a, b in zip(heard[:3], captions, strict=False))
        )


def scored(of: str, heard: Sequence[str], said: Sequence[str]) -> Iterator[Measure]:
    """Word error rate and clips heard right, from transcripts and what was to be said.

    Args:
        of: whose clips.
        heard: a transcript each.
        said: what was to be said, each with at least a word.
    """
    from omnimoe.encoders import normalize_transcript

    pairs = [
        (normalize_transcript(a).split(), normalize_transcript(b).split()) for a, b in zip(heard, said, strict=True)
    ]
    errors = np.array([word_errors(*pair) for pair in pairs], dtype=np.float64)
    words = np.array([len(wanted) for _, wanted in pairs], dtype=np.float64)
    rate = errors.sum() / words.sum()
    # a ratio of sums, so its spread is that of what each clip adds to the errors beyond its share
    spread = (
        Z95 * float(np.std(errors - rate * words, ddof=1)) * len(pairs) ** 0.5 / words.sum() if len(pairs) > 1 else 0
    )
    yield Measure(
        of=of,
        name="word error rate",
        value=float(rate),
        unit="share",
        better="lower",
        low=max(0.0, float(rate - spread)),
        high=float(rate + spread),
        count=int(words.sum()),
    )
    right = errors == 0
    low, high = wilson(float(right.sum()), len(right))
    yield Measure(
        of=of,
        name="captions heard right",
        value=float(right.mean()),
        unit="share",
        better="higher",
        low=low,
        high=high,
        count=len(right),
    )
    ten = right[:TEN]
    yield Measure(
        of=of,
        name=f"heard right, of the first {len(ten)}",
        value=float(ten.sum()),
        unit="clips",
        better="higher",
        count=len(ten),
    )

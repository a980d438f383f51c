"""Generated pictures: how far from real ones as a set, and whether each shows what was asked for.

Both look through EfficientNet-lite0, trained on photographs by others, so no model here was trained to please it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from omnimoe.data.corpus import Example
from omnimoe.evaluate.base import EvaluationError, Measure, NotRunError, register_metric
from omnimoe.evaluate.bench import Bench
from omnimoe.evaluate.retrieval import share_right
from omnimoe.evaluate.statistics import Z95, frechet_distance, kernel_distance

ENCODER = "efficientnet_lite0"
REAL, DECODED = "real", "decoded"
LEAST = 3
"""Fewest pictures that a distance is taken over."""
SHOWN = 12
"""Captions on the contact sheet."""
REFERENCE = 4
"""Real pictures of the other split for each picture that is measured, at most."""


@register_metric("pictures")
def pictures(bench: Bench) -> Iterator[Measure]:
    """Pictures generated for held-out captions: distance from real ones, and whether an encoder recognises them.

    Distances are from a set of pictures to real ones of another split: a set that a model drew, and as floors equally
    many real ones and what the tokenizer makes of them. Recognition asks whether, of 4 and more concepts, the one that
    was asked for is nearest. Concepts are the mean features of their real drawings; the ceiling is a real drawing in a
    style that its concept's mean does not hold.
    """
    encoder = load_encoder_or_not_run(ENCODER, bench)
    asked = bench.concepts("text", "image")
    captions = [bench.caption(example) for example in asked]
    real = [bench.picture(example) for example in asked]
    shown = {REAL: real}
    if bench.raw is None:
        bench.note(
            "No raw folder: real pictures are what their tokens decode to, so what the tokenizer loses does not count."
        )
    else:
        shown[DECODED] = [bench.decoded(example) for example in asked]
    for of, model in bench.models.items():
        if "image" in bench.modalities(model):
            made = bench.generate(model, [[("text", caption)] for caption in captions], "image", what=f"{of}: drawing")
            shown[of] = [picture.raw for picture in made]
    features = {of: encode_pictures(bench, encoder, held, of) for of, held in shown.items()}
    yield from _distances(bench, encoder, features)
    yield from _recognition(bench, encoder, asked, features)
    _sheet(bench, captions, shown)


def load_encoder_or_not_run(name: str, bench: Bench) -> Any:
    """An encoder, or the reason why the metric that needs it is not run."""
    from omnimoe.encoders import EncoderError, load_encoder

    try:
        return load_encoder(name, device=bench.device)
    except (EncoderError, ImportError) as error:
        raise NotRunError(str(error)) from error


def encode_pictures(bench: Bench, encoder: Any, held: Sequence[np.ndarray], what: str) -> np.ndarray:
    """``(n, D)`` float64 features of pictures."""
    starts = range(0, len(held), bench.batch_size)
    parts = [
        encoder.encode(held[start : start + bench.batch_size]).pooled.double().cpu().numpy()
        for start in bench.progress(starts, f"features: {what}")
    ]
    return np.concatenate(parts)


def _distances(bench: Bench, encoder: Any, features: Mapping[str, np.ndarray]) -> Iterator[Measure]:
    beside = "val" if bench.split != "val" else "test"
    try:
        found = bench.concepts("image", split=beside, num=None)
    except EvaluationError:
        bench.note(f"Split {beside} has no pictures, so there is nothing to measure a distance to.")
        return
    counts = [len(held) for held in features.values()]
    if min(len(found), *counts) < LEAST:
        bench.note(f"Distances need {LEAST} pictures on both sides, and there are {len(found)} and {min(counts)}.")
        return
    found = found[: REFERENCE * max(counts)]
    reference = encode_pictures(bench, encoder, [bench.picture(example) for example in found], f"real, {beside}")
    for of, held in features.items():
        distance, error = kernel_distance(held, reference)
        measure = Measure(
            of=of,
            name="kernel distance",
            value=distance,
            better="lower",
            low=distance - Z95 * error,
            high=distance + Z95 * error,
            count=len(held),
        )
        yield measure
        far = frechet_distance(held, reference)
        yield replace(measure, name="Fréchet distance", value=far, low=None, high=None)
    bench.note(
        f"Distances are to {len(found)} real pictures of split {beside}, one of each concept; the column {REAL!r} is "
        "the floor. The Fréchet distance grows as sets shrink, so read it against that column alone."
    )


def _recognition(
    bench: Bench, encoder: Any, asked: Sequence[Example], features: Mapping[str, np.ndarray]
) -> Iterator[Measure]:
    drawings = [
        [other for other in bench.drawings(example.group) if _differs(bench, other, example)] for example in asked
    ]
    usable = [i for i, held in enumerate(drawings) if held]
    sizes = [size for size in bench.candidates if size <= len(usable)]
    if not sizes:
        bench.note(
            f"Only {len(usable)} of the concepts have a second drawing, too few to choose among "
            f"{min(bench.candidates)}; raise --num."
        )
        return
    flat = [(place, other) for place, i in enumerate(usable) for other in drawings[i]]
    encoded = encode_pictures(bench, encoder, [bench.picture(other) for _, other in flat], "drawings")
    owners = np.array([place for place, _ in flat])
    centre = encoded.mean(0)
    prototypes = np.stack([_unit(encoded[owners == place] - centre).mean(0) for place in range(len(usable))])
    picks = np.array(
        [[i, *bench.wrong_ones(i, len(usable), max(sizes) - 1)] for i in range(len(usable))], dtype=np.int64
    )
    for of, held in features.items():
        scores = recognition_scores(held[usable] - centre, prototypes, picks)
        for size in sizes:
            yield share_right(of, f"recognised, 1 of {size}", scores[:, :size])
    bench.note(f"Recognition is over the {len(usable)} concepts that have another drawing to be compared with.")


def recognition_scores(queries: np.ndarray, prototypes: np.ndarray, picks: np.ndarray) -> np.ndarray:
    """Cosines of pictures with the concepts they are to be told among.

    Args:
        queries: ``(n, D)`` features, centred.
        prototypes: ``(m, D)``, one a concept.
        picks: ``(n, k)`` int64 into the concepts.

    Returns:
        ``(n, k)`` float64.
    """
    cosines = _unit(queries) @ _unit(prototypes).T
    return np.take_along_axis(cosines, picks, axis=1)


def _differs(bench: Bench, other: Example, example: Example) -> bool:
    """Whether a drawing has another style than the one that stands for real pictures."""
    images = bench.corpus.rows["image"]
    return other.style != example.style and images[other.index] != images[example.index]


def _unit(rows: np.ndarray) -> np.ndarray:
    return rows / np.maximum(np.linalg.norm(rows, axis=-1, keepdims=True), 1e-12)


def _sheet(bench: Bench, captions: Sequence[str], shown: Mapping[str, Sequence[np.ndarray]]) -> None:
    from omnimoe.evaluate.tokenizers import fit
    from omnimoe.plots import draw_grid

    bench.sheet(
        "pictures",
        "pictures for held-out captions: real ones, what the tokenizer makes of them, and what the models drew",
        lambda path: draw_grid(
            [[fit(picture, held[0]) for picture in held[:SHOWN]] for held in shown.values()],
            path,
            headings=list(shown),
            captions=captions[:SHOWN],
        ),
    )

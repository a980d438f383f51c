"""What the packaged encoders tell of the corpus: classes and concepts of drawings, words of clips, labels of keywords.

Pictures and clips are the originals of a corpus built with ``omnimoe data build``; the labels were never part of what
the encoders learned from. Nothing is trained here.

    omnimoe data build --set P --out corpus-p && python benchmarks/encoders.py --raw corpus-p
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import re
import time
from collections import defaultdict
from pathlib import Path

import numpy as np
import torch

from omnimoe import load_encoder
from omnimoe.encoders import normalize_transcript
from omnimoe.encoders.efficientnet import imagenet_classes
from omnimoe.evaluate.statistics import word_errors

PARTS = ["classes", "concepts", "labels", "words"]


def classes_of_drawings(rows: list[dict], images: np.ndarray, sizes: list[int]) -> None:
    """Drawings whose caption is the name of an ImageNet class: how often is it the first, or one of five?"""
    known = {name.lower() for name in imagenet_classes()}
    chosen = {row["image"]: row["text"].lower() for row in rows if row["text"].lower() in known}
    pictures = [images[index] for index in chosen]
    for size in sizes:
        encoder = load_encoder("efficientnet_lite0", image_size=size)
        started = time.perf_counter()
        told = encoder.classify(pictures, num=5)
        cost = (time.perf_counter() - started) / len(pictures)
        found = [[name.lower() for name in names] for names in told]
        first = sum(names[0] == text for names, text in zip(found, chosen.values(), strict=True))
        five = sum(text in names for names, text in zip(found, chosen.values(), strict=True))
        print(
            f"EfficientNet-lite0 at {size}: {len(pictures)} drawings of {len(set(chosen.values()))} ImageNet classes, "
            f"top-1 {first / len(pictures):.1%}, top-5 {five / len(pictures):.1%}, {1e3 * cost:.0f} ms a picture"
        )


def concepts_of_drawings(rows: list[dict], images: np.ndarray, num: int, size: int) -> None:
    """One drawing of a held-out concept: which of four drawings in other styles is of the same concept?"""
    by_concept: dict[str, dict[str, int]] = defaultdict(dict)
    for row in rows:
        if row["split"] == "test" and row["source"] == "emoji":
            by_concept[row["key"]][row["style"]] = row["image"]
    pairs = [tuple(held.values())[:2] for _, held in sorted(by_concept.items()) if len(held) > 1][:num]
    encoder = load_encoder("efficientnet_lite0", image_size=size)
    asked, answers = (encoder.encode([images[pair[side]] for pair in pairs]).pooled for side in (0, 1))
    middle = torch.cat((asked, answers)).mean(0)
    similarity = (
        torch.nn.functional.normalize(asked - middle, dim=-1)
        @ torch.nn.functional.normalize(answers - middle, dim=-1).T
    )
    drawn = random.Random(0)
    right = 0
    for place in range(len(pairs)):
        wrong = drawn.sample([other for other in range(len(pairs)) if other != place], 3)
        right += bool(similarity[place, place] > similarity[place, wrong].max())
    first = (similarity.argmax(1) == torch.arange(len(pairs))).float().mean()
    print(
        f"EfficientNet-lite0 at {size}: {len(pairs)} held-out concepts in two styles, right of 4: "
        f"{right / len(pairs):.1%} (chance 25 %), right of {len(pairs)}: {first:.1%}"
    )


def words_of_clips(rows: list[dict], clips: list[np.ndarray], num: int, seconds: list[int]) -> None:
    """Clips of held-out labels: errors a word, and clips with none."""
    said = {row["audio"]: row["text"] for row in rows if row["split"] == "test" and row["audio"] >= 0}
    chosen = random.Random(0).sample(sorted(said.items()), min(num, len(said)))
    wanted = [normalize_transcript(text) for _, text in chosen]
    words = sum(len(text.split()) for text in wanted)
    for window in seconds:
        encoder = load_encoder("whisper_tiny", seconds=window)
        started = time.perf_counter()
        heard = [normalize_transcript(text) for text in encoder.transcribe([clips[index] for index, _ in chosen])]
        cost = (time.perf_counter() - started) / len(chosen)
        errors = sum(word_errors(told.split(), text.split()) for told, text in zip(heard, wanted, strict=True))
        right = sum(told == text for told, text in zip(heard, wanted, strict=True))
        print(
            f"Whisper tiny.en, window {window} s: {len(chosen)} clips of held-out labels, word error rate "
            f"{errors / words:.1%}, {right} without an error, {cost:.2f} s a clip"
        )


def labels_of_keywords(rows: list[dict], num: int) -> None:
    """Keywords of an emoji without the words of its label: which of all labels is nearest?"""
    keywords = {}
    for row in rows:
        own = set(re.findall(r"\w+", row["text"].lower()))
        other = [tag for tag in row.get("tags", ()) if not own & set(re.findall(r"\w+", tag.lower()))]
        if len(other) > 1:
            keywords[row["text"]] = ", ".join(other)
    labels = random.Random(0).sample(sorted(keywords), min(num, len(keywords)))
    encoder = load_encoder("minilm")
    started = time.perf_counter()
    similarity = encoder.encode([keywords[label] for label in labels]).pooled @ encoder.encode(labels).pooled.T
    cost = (time.perf_counter() - started) / (2 * len(labels))
    rank = (similarity > similarity.diagonal().unsqueeze(1)).sum(1)
    print(
        f"MiniLM: {len(labels)} emoji by keywords that share no word with the label, right label first "
        f"{(rank == 0).float().mean():.1%}, among ten {(rank < 10).float().mean():.1%}, {1e3 * cost:.0f} ms a text"
    )


def main() -> None:
    """Prints one line a question."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--raw", type=Path, required=True, help="folder of a built corpus")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--num", type=int, default=400, help="most concepts, and labels")
    parser.add_argument("--clips", type=int, default=150)
    parser.add_argument("--sizes", type=int, nargs="+", default=[96, 160, 224])
    parser.add_argument("--seconds", type=int, nargs="+", default=[30])
    args = parser.parse_args()
    with (args.raw / "rows.jsonl").open(encoding="utf-8") as file:
        rows = [row for row in map(json.loads, file) if row["lang"] == "en" and row["image"] >= 0]
    images = np.load(args.raw / "images.npy", mmap_mode="r")
    audio, offsets = np.load(args.raw / "audio.npy", mmap_mode="r"), np.load(args.raw / "audio_offsets.npy")
    clips = [audio[start:stop] for start, stop in itertools.pairwise(offsets)]
    if "classes" in args.parts:
        classes_of_drawings(rows, images, args.sizes)
    if "concepts" in args.parts:
        concepts_of_drawings(rows, images, args.num, 160)
    if "labels" in args.parts:
        labels_of_keywords(rows, args.num)
    if "words" in args.parts:
        words_of_clips(rows, clips, args.clips, args.seconds)


if __name__ == "__main__":
    main()

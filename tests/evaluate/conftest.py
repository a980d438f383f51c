"""The shipped corpus, a fresh model, and one that has learned a few rows of the corpus by heart."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from omnimoe.data import Corpus, evaluation_batches
from omnimoe.evaluate import Bench
from omnimoe.model import OmniMoeForCausalLM
from omnimoe.tokenizers import load_tokenizer
from omnimoe.train.data import check_ranges
from tests.train.runs import build, tiny

LEARNED = 12


@pytest.fixture(scope="session")
def corpus() -> Corpus:
    return Corpus.load("p")


@pytest.fixture(scope="session")
def fresh() -> OmniMoeForCausalLM:
    return build(tiny("mot")).eval()


@pytest.fixture(scope="session")
def few(corpus, fresh) -> Corpus:
    """One row of each of a few concepts of the training split, with picture and clip."""
    bench = Bench(models={"fresh": fresh}, corpus=corpus, split="train", num=LEARNED)
    return bench.subset(np.sort([example.index for example in bench.concepts("text", "image", "speech")]))


@pytest.fixture(scope="session")
def learned(few) -> OmniMoeForCausalLM:
    """Knows by heart which picture goes with which caption in ``few``."""
    model = build(tiny("mot"))
    ranges = check_ranges(model.config, few)
    orders = (("text", "image"), ("image", "text"))
    given = {"sequence_length": 256, "batch_size": 32, "split": "train", "running_text": False, "axes": 1}
    batches = [batch for order in orders for batch in evaluation_batches(few, ranges, order=order, **given)]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(40):
        for batch in batches:
            optimizer.zero_grad()
            model(**batch).loss.backward()
            optimizer.step()
    return model.eval()


@pytest.fixture(scope="session")
def raw_folder(corpus, fresh, tmp_path_factory) -> Path:
    """A built corpus of a few concepts of the shipped one, each in several styles; raw material from its tokens."""
    folder = tmp_path_factory.mktemp("raw")
    text, pictures, speech = (load_tokenizer(name) for name in ("text", "picture", "speech"))
    images, clips, rows = [], [], []
    for split, count in (("train", 4), ("val", 8), ("test", 14)):
        bench = Bench(models={"fresh": fresh}, corpus=corpus, split=split)
        every = bench.concepts("text", "image", "speech", num=None)
        several = [held for held in every if len({drawing.style for drawing in bench.drawings(held.group)}) > 2]
        for example in several[:count]:
            clips.append((32767 * speech.decode(example.speech)).astype(np.int16))
            for drawing in bench.drawings(example.group)[:4]:
                rows.append(
                    {
                        "source": drawing.source,
                        "text": text.decode(drawing.text),
                        "lang": "en",
                        "image": len(images),
                        "audio": len(clips) - 1,
                        "key": f"group {drawing.group}",
                        "group": f"group {drawing.group}",
                        "split": split,
                        "style": drawing.style,
                        "license": "see the shipped corpus",
                    }
                )
                images.append(pictures.decode(drawing.image))
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    (folder / "text.jsonl").write_text("", encoding="utf-8")
    np.save(folder / "images.npy", np.stack(images))
    np.save(folder / "audio.npy", np.concatenate(clips))
    np.save(folder / "audio_offsets.npy", np.cumsum([0, *map(len, clips)]))
    return folder


@pytest.fixture(scope="session")
def small(raw_folder) -> Corpus:
    """The tokens of ``raw_folder``."""
    return Corpus.load(raw_folder)

"""The shipped corpus, a fresh model, and one that has learned a few rows of the corpus by heart."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from omnimoe.data import Corpus, evaluation_batches
from omnimoe.evaluate import Bench
from omnimoe.model import OmniMoeForCausalLM
from omnimoe.train.data import check_ranges
from tests.train.runs import build, tiny

LEARNED = 16


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

"""Losses by direction are those of single documents."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch

from omnimoe.data.corpus import Interleaved, Ragged
from omnimoe.data.documents import lay_out
from omnimoe.evaluate import Bench, evaluate
from omnimoe.tokenizers.text import BOS_ID, EOS_ID, SPECIAL_TOKENS
from tests.train.runs import build, tiny


@pytest.fixture(scope="module")
def found(few, fresh):
    return evaluate({"fresh": fresh}, corpus=few, split="train", metrics=["loss"], num=5)


def by_hand(model, corpus, rows, order, target):
    """Mean loss of the target's own tokens, one document at a time."""
    ranges = model.config.token_ranges
    held = ranges[target]
    first = held.start + (len(SPECIAL_TOKENS) if target == "text" else 0)
    losses = []
    for row in rows:
        spans = [(name, corpus[int(row)].get(name)) for name in order]
        ids = torch.from_numpy(lay_out(spans, ranges, bos_id=BOS_ID, eos_id=EOS_ID).ids)[None]
        with torch.no_grad():
            each = model(ids, labels=ids).token_losses[0]
        losses += each[(ids[0] >= first) & (ids[0] < held.stop)].tolist()
    return float(np.mean(losses)), len(losses)


@pytest.mark.parametrize(("order", "target"), [(("text", "image"), "image"), (("speech", "text"), "text")])
def test_a_direction_is_what_single_documents_give(found, few, fresh, order, target):
    groups = sorted({measure.count for measure in found.measures["loss"] if measure.name == "text -> image"})
    assert groups == [5 * 64]
    bench = Bench(models={"fresh": fresh}, corpus=few, split="train", num=5)
    rows = [example.index for example in bench.concepts("text")]
    value, count = by_hand(fresh, few, rows, order, target)
    measure = found.find("loss", " -> ".join(order), "fresh", "nats/token")
    assert measure.value == pytest.approx(value, rel=1e-4)
    assert measure.count == count


def test_all_directions_and_what_comes_first(found):
    names = [name for name, unit, _ in found.rows("loss") if unit == "nats/token"]
    for name in ("text", "image", "speech"):
        assert f"nothing -> {name}" in names
        assert f"{name}, any order" in names
    assert sum(" -> " in name and not name.startswith("nothing") for name in names) == 6


def test_bits_of_a_picture_and_of_a_second(found, few):
    nats = found.find("loss", "text -> image", "fresh", "nats/token")
    bits = found.find("loss", "text -> image", "fresh", "bits/picture")
    assert bits.value == pytest.approx(nats.value * 64 / math.log(2))
    assert bits.chance == pytest.approx(64 * math.log2(1000))
    heard = found.find("loss", "text -> speech", "fresh", "nats/token")
    rate = found.find("loss", "text -> speech", "fresh", "bits/s")
    assert rate.value == pytest.approx(heard.value * few.meta["units_per_second"] / math.log(2))


def test_a_fresh_model_is_near_chance_and_one_that_knows_the_pairs_is_not(few, fresh, learned):
    pair = evaluate({"fresh": fresh, "learned": learned}, corpus=few, split="train", metrics=["loss"], num=None)
    for name in ("text -> image", "image -> text"):
        start, known = (pair.find("loss", name, of, "nats/token") for of in ("fresh", "learned"))
        assert start.value == pytest.approx(math.log(4048), abs=0.5)
        assert known.value < 1


def test_running_text_is_bounded_by_num(corpus):
    model = build(tiny("dense"))
    small = evaluate({"m": model}, corpus=corpus, split="val", metrics=["loss"], num=3)
    measure = small.find("loss", "running text", "m")
    assert 600 <= measure.count < 3_000
    assert model.training


def test_interleaved_documents_of_ones_own_are_measured(few, fresh):
    """Two documents made of the corpus' own texts and pictures; the rows are left out."""
    kinds, items = np.array([0, 1, 0, 1, 0]), np.array([0, 0, 1, 1, 2])
    held = Interleaved(
        kinds=Ragged(values=kinds, offsets=np.array([0, 3, 5])),
        items=Ragged(values=items, offsets=np.array([0, 3, 5])),
        splits=np.array([0, 0]),
    )
    own = dataclasses.replace(Bench(models={}, corpus=few).subset(()), interleaved=held)
    found = evaluate({"fresh": fresh}, corpus=own, split="train", metrics=["loss"], num=3)
    assert "loss" not in found.not_run
    spans = [own.interleaved_spans(index) for index in range(2)]
    losses = []
    for document in spans:
        ids = torch.from_numpy(lay_out(document, fresh.config.token_ranges, bos_id=BOS_ID, eos_id=EOS_ID).ids)[None]
        with torch.no_grad():
            losses += fresh(ids, labels=ids).token_losses[0, 1:].tolist()
    assert found.find("loss", "all tokens, interleaved", "fresh").value == pytest.approx(np.mean(losses), rel=1e-4)
    assert {measure.name.partition(", ")[2] for measure in found.measures["loss"]} == {"interleaved"}

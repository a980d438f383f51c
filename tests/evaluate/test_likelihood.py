"""Likelihoods of packed documents are those of each document by itself."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from omnimoe.data.documents import lay_out
from omnimoe.evaluate import log_likelihoods
from omnimoe.layers import Rope
from omnimoe.model import MODELS
from omnimoe.shrink import shrink
from omnimoe.tokenizers.text import BOS_ID, EOS_ID
from omnimoe.train.data import DataMismatchError
from tests.train.runs import build, tiny


@pytest.fixture(scope="module")
def example(corpus):
    return next(corpus.examples("test", having=("text", "image", "speech")))


def alone(model, corpus, given, target, axes=1):
    """Log-probabilities of the target's tokens and of what ends it, from the logits of one unpadded document."""
    ranges = model.config.token_ranges
    piece = lay_out([*given, target], ranges, bos_id=BOS_ID, eos_id=EOS_ID, grids=corpus.grids)
    ids, positions = torch.from_numpy(piece.ids)[None], torch.from_numpy(piece.positions)[None]
    with torch.no_grad():
        log_probs = (
            model(ids, position_ids=positions if axes == 3 else None)
            .logits.log_softmax(-1)[0, :-1]
            .gather(1, ids[0, 1:, None])[:, 0]
        )
    name, local = target
    markers = 0 if ranges[name].end_id is None else 1
    stop = len(piece) - 2 - markers
    tokens = log_probs[stop - len(local) : stop]
    assert (ids[0, 1:][stop - len(local) : stop] == torch.from_numpy(local) + ranges[name].start).all()
    end = log_probs[stop] if ranges[name].num_tokens is None else torch.zeros(())
    return float(tokens.double().sum() + end), len(local) + (ranges[name].num_tokens is None)


def test_packed_documents_score_as_each_alone(fresh, corpus, example):
    spans = {name: (name, np.asarray(example.get(name))) for name in ("text", "image", "speech")}
    documents = [
        ((spans["text"],), spans["image"]),
        ((spans["image"],), spans["text"]),
        ((spans["image"], spans["text"]), spans["speech"]),
        ((), spans["speech"]),
        ((), spans["text"]),
    ]
    found, counts = log_likelihoods(fresh, corpus, documents, batch_size=2)
    for value, count, (given, target) in zip(found, counts, documents, strict=True):
        expected, tokens = alone(fresh, corpus, given, target)
        assert value == pytest.approx(expected, rel=1e-5)
        assert count == tokens


def test_a_model_of_three_position_axes_gets_three(corpus, example):
    config = tiny("mot")
    rope = Rope.Config(sections=(4, 2, 2))
    model = build(config.replace(attention=config.attention.replace(rope=rope))).eval()
    document = ((("text", example.text),), ("image", example.image))
    found, _ = log_likelihoods(model, corpus, [document])
    expected, _ = alone(model, corpus, *document, axes=3)
    assert found[0] == pytest.approx(expected, rel=1e-6)
    assert found[0] != pytest.approx(alone(model, corpus, *document)[0], rel=1e-6)


def test_order_and_repetition_change_nothing(fresh, corpus):
    rows = [corpus[int(row)] for row in corpus.select("test", having=("text", "image"))[:9]]
    documents = [((("text", row.text),), ("image", row.image)) for row in rows]
    found, _ = log_likelihoods(fresh, corpus, documents)
    again, _ = log_likelihoods(fresh, corpus, [*documents[::-1], documents[3]], batch_size=1)
    assert again[:9] == pytest.approx(found[::-1], rel=1e-6)
    assert again[9] == again[5]


def test_probabilities_of_all_texts_of_one_token_add_to_that_of_such_a_text(corpus):
    model = build(tiny("dense")).eval()
    words = np.arange(16, 2048)
    documents = [((), ("text", np.array([word]))) for word in words]
    found, counts = log_likelihoods(model, corpus, documents, batch_size=64)
    assert set(counts) == {2}
    ids = torch.tensor([[BOS_ID]])
    with torch.no_grad():
        first = model(ids).logits.softmax(-1)[0, 0, 16:2048]
        both = torch.stack((torch.full((len(words),), BOS_ID), torch.from_numpy(words)), 1)
        end = model(both).logits.softmax(-1)[:, 1, EOS_ID]
    assert np.exp(found).sum() == pytest.approx(float((first * end).sum()), rel=1e-4)


def test_a_model_of_another_vocabulary_is_refused(corpus):
    model = build(shrink(MODELS.get("mot_37m")()))
    with pytest.raises(DataMismatchError, match="codes of text, the model"):
        log_likelihoods(model, corpus, [])

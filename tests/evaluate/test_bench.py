"""Concepts and candidates: the same ones each time, no two of one component, and fewer are the first of more."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch

from omnimoe.evaluate import Bench, EvaluationError
from omnimoe.generate import generate, set_sampling


@pytest.fixture
def bench(corpus, fresh) -> Bench:
    return Bench(models={"fresh": fresh}, corpus=corpus, num=20)


def test_concepts_are_one_row_each_and_repeat(bench, corpus, fresh):
    found = bench.concepts("text", "image")
    assert len(found) == 20
    assert len({example.group for example in found}) == 20
    assert all(example.split == "test" and example.lang == "en" and example.image is not None for example in found)
    again = Bench(models={"other": fresh}, corpus=corpus, num=20).concepts("text", "image")
    assert [example.index for example in again] == [example.index for example in found]
    other = Bench(models={"fresh": fresh}, corpus=corpus, num=20, seed=1).concepts("text", "image")
    assert {example.index for example in other} != {example.index for example in found}


def test_every_concept_is_there_once_where_all_are_wanted(bench, corpus):
    found = bench.concepts("text", "image", num=None)
    rows = corpus.select("test", having=("text", "image"))
    assert {example.group for example in found} == set(corpus.rows["group"][rows].tolist())
    assert len(found) == len({example.group for example in found})
    assert [example.index for example in found[:20]] == [example.index for example in bench.concepts("text", "image")]


def test_metrics_that_ask_for_other_modalities_get_the_same_concepts(bench):
    pictures = {example.group for example in bench.concepts("image", num=None)}
    clips = [example.group for example in bench.concepts("speech", num=None)]
    both = [example.group for example in bench.concepts("image", "speech", num=None)]
    assert both == [group for group in clips if group in pictures]


def test_wrong_ones_are_others_and_nested(bench):
    for index in range(5):
        many = bench.wrong_ones(index, 20, 9)
        assert len(set(many)) == 9
        assert index not in many
        assert bench.wrong_ones(index, 20, 3) == many[:3]
    assert bench.wrong_ones(0, 20, 9) != bench.wrong_ones(1, 20, 9)


def test_drawings_of_a_concept_are_distinct_pictures(bench, corpus):
    example = max(bench.concepts("image", num=None), key=lambda held: len(bench.drawings(held.group)))
    found = bench.drawings(example.group)
    images = [corpus.rows["image"][held.index] for held in found]
    assert len(set(images)) == len(images) > 5
    assert {held.group for held in found} == {example.group}


def test_what_a_split_lacks_is_an_error(corpus, fresh):
    empty = Bench(models={"fresh": fresh}, corpus=corpus).subset(())
    with pytest.raises(EvaluationError, match="has no row with text and image"):
        Bench(models={"fresh": fresh}, corpus=empty).concepts("text", "image")


def test_a_subset_keeps_rows_and_their_contents(bench, corpus):
    rows = corpus.select("test")[[5, 3]]
    kept = bench.subset(rows)
    assert len(kept) == 2
    assert np.array_equal(kept[0].text, corpus[int(rows[0])].text)
    assert len(kept.select_documents("test")) == 0


def test_generation_in_batches_has_one_output_for_each_document_and_repeats(bench, fresh):
    captions = [[("text", bench.caption(example))] for example in bench.concepts("text", "image")[:5]]
    bench.batch_size = 2
    found = bench.generate(fresh, captions, "image")
    assert [picture.raw.shape for picture in found] == [(64, 64, 3)] * 5
    again = bench.generate(fresh, captions, "image")
    assert all(torch.equal(one.ids, other.ids) for one, other in zip(found, again, strict=True))


def test_models_are_sampled_alike_or_as_each_was_saved(bench, fresh):
    saved = copy.deepcopy(fresh)
    set_sampling(saved, {"image": {"temperature": 0}})
    caption = [[("text", "a red apple")]]
    (alike,) = bench.generate(saved, caption, "image")
    assert torch.equal(alike.ids, bench.generate(fresh, caption, "image")[0].ids)
    bench.saved_sampling = True
    (own,) = bench.generate(saved, caption, "image")
    (likeliest,) = generate(fresh, caption, "image", temperature=0)
    assert torch.equal(own.ids, likeliest.ids)
    bench.sampling = {"image": {"temperature": 1.0}}
    (asked,) = bench.generate(saved, caption, "image")
    assert not torch.equal(asked.ids, own.ids)
    bench.sampling = {"image": {"best_of": 3}}
    (best,) = bench.generate(fresh, caption, "image")
    drawn = generate(fresh, caption, "image", seed=bench.seed, num_samples=3)
    assert any(torch.equal(best.ids, one.ids) for one in drawn)

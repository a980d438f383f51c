"""Batches come in the model's own vocabulary, and a corpus that does not fit is refused."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from omnimoe.layers import Rope
from omnimoe.modalities import Patches, Tokens
from omnimoe.spans import span_positions
from omnimoe.tokenizers.text import SPECIAL_TOKENS
from omnimoe.train import DataMismatchError, held_out_batches, training_batches
from omnimoe.train.data import add_noise
from tests.train.runs import settings, tiny


def change(name, **fields):
    """The tiny model with one modality declared otherwise."""
    config = tiny()
    return config.replace(
        modalities=tuple(held.replace(**fields) if held.name == name else held for held in config.modalities)
    )


def test_packed_batches_have_what_the_model_takes(corpus):
    batch = next(training_batches(tiny(), settings(), corpus))
    assert set(batch) == {"input_ids", "labels", "modality_ids", "segment_ids", "position_ids"}
    assert all(value.shape == (2, 128) and value.dtype == torch.int64 for value in batch.values())
    assert set(batch["modality_ids"].unique().tolist()) == {0, 1, 2}


def test_a_model_with_three_axes_is_trained_on_the_positions_that_generation_reads_off_the_ids(corpus):
    config = tiny()
    config = config.replace(attention=config.attention.replace(rope=Rope.Config(sections=(4, 2, 2))))
    batch = next(training_batches(config, settings(), corpus))
    ids, segments, positions = batch["input_ids"], batch["segment_ids"], batch["position_ids"]
    assert positions.shape == (2, 128, 3)
    assert (positions[..., 1] != positions[..., 2]).any()
    for row in range(2):
        for segment in range(int(segments[row].max()) + 1):
            inside = segments[row] == segment
            wanted = span_positions(config, ids[row][inside][None], {"image": (8, 8)})
            assert torch.equal(positions[row][inside], wanted[0])


def test_the_seed_alone_decides_the_order(corpus):
    config = tiny()
    one, other = (training_batches(held, settings(), corpus) for held in (config, tiny("mot")))
    assert all(torch.equal(next(one)["input_ids"], next(other)["input_ids"]) for _ in range(3))
    third = training_batches(config, settings(seed=1), corpus)
    assert not torch.equal(next(training_batches(config, settings(), corpus))["input_ids"], next(third)["input_ids"])


def test_modality_ids_are_those_the_model_reads_off_the_ids(corpus):
    extra = Tokens.Config(name="touch", vocab_size=10)
    text, image, speech = tiny().modalities
    own = change("image").replace(markers="own")
    between = tiny().replace(modalities=(text, extra, image, speech))
    for config in (own, between):
        batch = next(training_batches(config, settings(), corpus))
        assert torch.equal(batch["modality_ids"], config.modality_of_ids()[batch["input_ids"]])
    numbers = next(training_batches(between, settings(), corpus))["modality_ids"].unique().tolist()
    assert numbers == [0, 2, 3]


def test_a_model_without_a_modality_trains_on_the_others(corpus):
    text, image, _ = tiny().modalities
    config = tiny().replace(modalities=(text, image))
    batch = next(training_batches(config, settings(), corpus))
    assert int(batch["input_ids"].max()) < config.vocab_size


def test_templates_shape_training_and_leave_held_out_batches_alone(corpus):
    plain, mixed = settings(), settings(templates="alone=1")
    batch = next(training_batches(tiny(), mixed, corpus))
    opened = (batch["input_ids"] == 3) | (batch["input_ids"] == 5)
    # every begin marker follows the one that begins the document
    assert bool((batch["input_ids"].roll(1, 1)[opened] == 1).all())
    assert int(opened.sum()) > 1
    pairs = zip(*(held_out_batches(tiny(), s, corpus) for s in (plain, mixed)), strict=True)
    assert all(torch.equal(one["input_ids"], other["input_ids"]) for one, other in pairs)


def test_held_out_batches_are_the_same_every_time_and_for_every_seed(corpus):
    one = held_out_batches(tiny(), settings(), corpus)
    other = held_out_batches(tiny("mot"), settings(seed=5), corpus)
    assert len(one) == 2
    assert all(torch.equal(a["input_ids"], b["input_ids"]) for a, b in zip(one, other, strict=True))
    test = held_out_batches(tiny(), settings(), corpus, split="test", count=1)
    assert len(test) == 1
    assert not torch.equal(test[0]["input_ids"], one[0]["input_ids"])


@pytest.mark.parametrize(
    ("config", "told"),
    [
        (change("text", vocab_size=500), "500"),
        (change("image", vocab_size=7), "codes of image, the model 7"),
        (change("speech", begin_id=None), "'speech' of the model has no begin_id"),
        (change("image", begin_id=900, end_id=901), "900 and 901, are words"),
        (tiny().replace(modalities=(Tokens.Config(name="words", vocab_size=4000),)), "words"),
        (
            tiny().replace(modalities=(tiny().modalities[0], Patches.Config(name="image", placeholder_id=3))),
            "'image' is continuous",
        ),
    ],
)
def test_a_corpus_that_does_not_fit_is_refused(corpus, config, told):
    with pytest.raises(DataMismatchError, match=told):
        training_batches(config, settings(), corpus)


def test_a_larger_vocabulary_than_the_corpus_fits(corpus):
    config = change("image", vocab_size=corpus.vocab_sizes["image"] + 24)
    assert next(training_batches(config, settings(), corpus))["input_ids"].shape == (2, 128)


def test_the_corpus_is_not_changed(corpus):
    before = dataclasses.asdict(corpus)["meta"]
    next(training_batches(tiny(), settings(), corpus))
    assert corpus.meta == before


def test_noise_replaces_a_share_of_the_inputs_of_its_modality_and_nothing_else(corpus):
    config = tiny()
    batches = training_batches(config, settings(batch_size=8), corpus)
    torch.manual_seed(0)
    for _ in range(2):
        batch = next(batches)
        noisy = add_noise(batch, config, {"image": 0.5})
        changed = noisy["input_ids"] != batch["input_ids"]
        held = config.token_ranges["image"]
        own = (batch["input_ids"] >= held.start) & (batch["input_ids"] < held.start + held.size)
        assert own.any()
        assert not changed[~own].any()
        assert 0.4 < changed[own].float().mean() < 0.6
        assert torch.equal(config.modality_of_ids()[noisy["input_ids"]], batch["modality_ids"])
        for name in set(batch) - {"input_ids"}:
            assert torch.equal(noisy[name], batch[name])


def test_noise_leaves_markers_alone_and_draws_nothing_where_there_is_none(corpus):
    config = tiny()
    batch = next(training_batches(config, settings(), corpus))
    noisy = add_noise(batch, config, {"text": 0.9})["input_ids"]
    special = batch["input_ids"] < len(SPECIAL_TOKENS)
    assert torch.equal(noisy[special], batch["input_ids"][special])
    before = torch.get_rng_state()
    assert torch.equal(add_noise(batch, config, {})["input_ids"], batch["input_ids"])
    assert torch.equal(torch.get_rng_state(), before)
    with pytest.raises(DataMismatchError, match="noise is for 'video', but the model's tokens are text, image, speech"):
        add_noise(batch, config, {"video": 0.1})

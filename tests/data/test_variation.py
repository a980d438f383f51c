"""Varied pictures and clips: the same things in other tokens, a version each pass, and never on what is held out."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from omnimoe.data import Corpus, CorpusError, PackedSequences, build_own, default_ranges, evaluation_batches
from omnimoe.data.tokenize import tokenize_corpus
from omnimoe.data.variation import vary_clip, vary_picture
from omnimoe.tokenizers import load_tokenizer
from tests.tokenizers.adapted import PICTURES

VERSIONS = 2


@pytest.fixture(scope="module")
def folder(own_rows, tmp_path_factory) -> Path:
    """A corpus of 24 rows, all of them for training, with two versions."""
    folder = build_own(own_rows, tmp_path_factory.mktemp("varied") / "corpus")
    return tokenize_corpus(folder, folder / "tokens", versions=VERSIONS)


@pytest.fixture(scope="module")
def corpus(folder) -> Corpus:
    return Corpus.load(folder)


def test_a_picture_keeps_its_ground_and_most_of_itself():
    random = np.random.default_rng(0)
    for path in PICTURES:
        picture = np.asarray(Image.open(path).convert("RGB"))
        varied = vary_picture(picture, random)
        assert (varied.shape, varied.dtype) == (picture.shape, np.uint8)
        assert (varied != picture).any()
        # as much ink as before, up to the square of the scale
        ink, before = (255.0 - varied).sum(), (255.0 - picture).sum()
        assert 0.6 * before < ink < 1.15 * before


@pytest.mark.parametrize("dtype", [np.int16, np.float32])
def test_a_clip_is_faster_and_never_longer(dtype):
    time = np.arange(16_000) / 16_000
    tone = (0.5 * np.sin(2 * np.pi * 400 * time) * (32_767 if dtype == np.int16 else 1)).astype(dtype)
    for seed in range(10):
        varied = vary_clip(tone, np.random.default_rng(seed))
        assert varied.dtype == dtype
        assert len(varied) <= len(tone)
        spectrum = np.abs(np.fft.rfft(varied.astype(float), 16_000))
        assert 398 <= spectrum.argmax() <= 400 * 1.08 + 2


def test_versions_are_of_the_same_things_in_other_tokens(corpus):
    assert len(corpus.versions) == VERSIONS
    assert corpus.version(0) is corpus is corpus.version(VERSIONS + 1)
    picture = load_tokenizer("picture")
    decode = lambda held, row: picture.decode(held[row].image).astype(float)  # noqa: E731
    for number in range(1, VERSIONS + 1):
        other = corpus.version(number)
        assert (other.images != corpus.images).mean() > 0.3
        assert (other.clips.lengths <= corpus.clips.lengths).all()
        right = wrong = 0.0
        for row in range(len(corpus)):
            assert other[row].text.tolist() == corpus[row].text.tolist()
            right += np.square(decode(other, row) - decode(corpus, row)).mean()
            wrong += np.square(decode(other, row) - decode(corpus, (row + 1) % len(corpus))).mean()
        assert right < wrong


def test_each_pass_takes_the_next_version_and_resuming_is_exact(corpus):
    ranges = default_ranges(corpus)
    shown = lambda number: {bytes(ids.astype(np.int64)) for ids in corpus.version(number).images}  # noqa: E731
    known = [shown(number) for number in range(VERSIONS + 1)]
    make = lambda: PackedSequences(corpus, ranges, sequence_length=192, batch_size=1)  # noqa: E731
    batches, found, state, after = make(), {}, None, []
    while batches.epoch < VERSIONS + 2:
        epoch = int(batches.epoch)
        batch = next(batches)
        ids = batch["input_ids"][0].numpy()
        for start in np.flatnonzero(ids == ranges["image"].begin_id):
            span = bytes((ids[start + 1 : start + 65] - ranges["image"].start).astype(np.int64))
            found.setdefault(epoch, []).append([span in version for version in known])
        if state is not None:
            after.append(batch)
        elif epoch == VERSIONS:
            state = batches.state_dict()
    for epoch, hits in found.items():
        # a sequence may reach into the next pass
        assert np.mean([hit[epoch % (VERSIONS + 1)] for hit in hits]) > 0.7
    resumed = make()
    resumed.load_state_dict(state)
    for batch in after[:4]:
        assert next(resumed)["input_ids"].equal(batch["input_ids"])


def test_what_is_held_out_is_told_as_it_is(corpus):
    kept = evaluation_batches(corpus, default_ranges(corpus), sequence_length=192, batch_size=2, split="train")
    plain = evaluation_batches(
        corpus.version(0), default_ranges(corpus), sequence_length=192, batch_size=2, split="train"
    )
    assert all(first["input_ids"].equal(second["input_ids"]) for first, second in zip(kept, plain, strict=True))


def test_a_corpus_with_versions_of_something_else_is_refused(folder, tmp_path):
    with pytest.raises(CorpusError, match="versions must be 0 or more, got -1"):
        tokenize_corpus(folder.parent, tmp_path, versions=-1)
    (tmp_path / "corpus.json").write_bytes((folder / "corpus.json").read_bytes())
    with np.load(folder / "tokens.npz") as stored:
        arrays = {name: stored[name] for name in stored.files}
    np.savez(tmp_path / "tokens.npz", **{**arrays, "image_1_values": arrays["image_1_values"][1:]})
    with pytest.raises(CorpusError, match="versions of other pictures and clips"):
        Corpus.load(tmp_path)

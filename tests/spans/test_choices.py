"""Choices by modality: equal to transformers' own, row by row."""

from __future__ import annotations

import pytest
import torch
from transformers import MinPLogitsWarper, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from omnimoe.modalities import Tokens
from omnimoe.model import OmniMoeConfig
from omnimoe.spans import SpanChoices, SpanError
from tests.declarations import DENSE

TEXT, IMAGE, SPEECH = 0, 1, 2
WARPERS = {
    "temperature": TemperatureLogitsWarper,
    "top_k": TopKLogitsWarper,
    "top_p": TopPLogitsWarper,
    "min_p": MinPLogitsWarper,
}


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 0.7},
        {"top_k": 5},
        {"top_p": 0.6},
        {"min_p": 0.3},
        {"temperature": 2.0, "top_k": 9, "top_p": 0.8, "min_p": 0.1},
        {"top_k": 500, "top_p": 1e-6},
    ],
    ids=str,
)
def test_each_is_what_transformers_does(options):
    scores = 3 * torch.randn(8, DENSE.vocab_size)
    scores[:, 10:14] = -torch.inf
    wanted = scores
    for name, value in options.items():
        wanted = WARPERS[name](value)(None, wanted)
    choose = SpanChoices(DENSE, **{name: {"image": value} for name, value in options.items()})
    found = choose(scores, torch.tensor([IMAGE] * 8))
    torch.testing.assert_close(found, wanted)
    assert torch.equal(choose(scores, torch.tensor([TEXT, SPEECH] * 4)), scores)


def test_each_row_has_the_choice_of_its_modality():
    choose = SpanChoices(DENSE, top_k={"text": 2, "image": 3})
    kept = choose(torch.randn(3, 40), torch.tensor([TEXT, IMAGE, SPEECH])).isfinite().sum(1)
    assert kept.tolist() == [2, 3, 40]


def test_modalities_without_spans_share_one_choice():
    pictures = Tokens.Config(name="image", vocab_size=12)
    config = OmniMoeConfig(modalities=(Tokens.Config(name="text", vocab_size=20), pictures))
    choose = SpanChoices(config, top_k={"image": 4})
    assert choose(torch.randn(1, 32), torch.tensor([0])).isfinite().sum() == 4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"top_p": {"image": 0.0}}, "top_p must be positive and at most 1, got 0.0"),
        ({"top_p": {"image": 1.5}}, "at most 1, got 1.5"),
        ({"min_p": {"image": -0.1}}, "min_p must be at least 0 and at most 1, got -0.1"),
        ({"temperature": {"image": float("inf")}}, "temperature must be finite, got inf"),
        ({"top_k": {"text": float("inf")}}, "top_k must be finite, got inf"),
        ({"top_p": {"text": float("inf")}}, "top_p must be positive and at most 1, got inf"),
        ({"temperature": {"image": 0.0}}, "temperature must be positive, got 0.0"),
        ({"top_k": {"video": 3}}, "top_k names 'video'; the modalities are text, image, speech"),
    ],
)
def test_values_out_of_range_are_refused(options, message):
    with pytest.raises(SpanError, match=message):
        SpanChoices(DENSE, **options)

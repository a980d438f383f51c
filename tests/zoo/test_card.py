"""What the cards of families say of licences."""

from __future__ import annotations

import pytest

from omnimoe import model_info
from omnimoe.catalogue import card_of
from omnimoe.model import MODELS


@pytest.mark.parametrize(
    ("name", "licence", "head"),
    [
        ("qwen2_0_5b", "Apache-2.0", {"license": "apache-2.0"}),
        ("qwen1_5_moe_a2_7b", "Tongyi Qianwen", {"license": "other", "license_name": "tongyi-qianwen"}),
        ("moonlight_16b_a3b", "MIT", {"license": "mit"}),
        ("deepseek_v3", "DeepSeek Model License", {"license": "other", "license_name": "deepseek-model-license"}),
        ("chameleon_7b", "Chameleon Research License", {"license": "other"}),
        ("pi0", "gemma", {"license": "gemma"}),
    ],
)
def test_licences_as_they_are_and_as_the_hub_takes_them(name, licence, head):
    assert model_info(name).license == licence
    facts = card_of(name).facts(name)
    assert head.items() <= facts.items()
    assert ("license_name" in facts) == (facts["license"] == "other")


def test_cards_speak_of_registered_models_only():
    for name in MODELS:
        card = card_of(name)
        if card is not None:
            assert {*card.weights, *card.papers, *card.licenses, *card.unread} <= set(MODELS.names())
            assert not set(card.weights) & set(card.unread)

"""Parts written over the keys of a seed, for a model that has more of them or others."""

from __future__ import annotations

import pytest

from omnimoe import RoutedExperts
from omnimoe.layers.reader_attention import ReaderAttention
from omnimoe.routers import AttributeRouter, ByModalityRouter, TopKRouter
from omnimoe.upcycle.keys import extend_keys, extend_map

ORIGIN = (0, 1, 1)
"""Two keys of a seed, and a third that starts as the second."""


@pytest.mark.parametrize(
    ("towers", "wanted"),
    [
        ("shared", "shared"),
        ("modality", "modality"),
        ((0, 0), "shared"),
        ((0, 1), "modality"),
        ((1, 0), (1, 0, 0)),
    ],
)
def test_tower_maps(towers, wanted):
    assert extend_map(towers, ORIGIN, 2) == wanted


@pytest.mark.parametrize(
    ("part", "field", "wanted"),
    [
        (ReaderAttention.Config(num_heads=2, readers=(False, True)), "readers", (False, True, True)),
        (TopKRouter.Config(entropy_keys=(1,)), "entropy_keys", (1, 2)),
        (TopKRouter.Config(entropy_keys=(0,)), "entropy_keys", (0,)),
        (AttributeRouter.Config(attributes_of_keys=((1, 0), (1, 1))), "attributes_of_keys", ((1, 0), (1, 1), (1, 1))),
        (AttributeRouter.Config(), "attributes_of_keys", ()),
        (ByModalityRouter.Config(experts=(3, 2)), "experts", (3, 2, 2)),
        (RoutedExperts.Config(num_experts=5, router=ByModalityRouter.Config(experts=(3, 2))), "num_experts", 7),
    ],
)
def test_fields_over_keys(part, field, wanted):
    """Also inside of a list, as ranges of layers hold parts."""
    for found in (extend_keys(part, origin=ORIGIN, num_keys=2), *extend_keys([part], origin=ORIGIN, num_keys=2)):
        assert type(found) is type(part)
        assert getattr(found, field) == wanted

"""Public names of the package, loaded on first use."""

from __future__ import annotations

import pytest

import omnimoe


def test_an_unknown_name_suggests_the_nearest():
    with pytest.raises(AttributeError, match="has no attribute 'from_pretraned'; did you mean 'from_pretrained'"):
        omnimoe.from_pretraned  # noqa: B018
    with pytest.raises(AttributeError, match="has no attribute 'zzzzzz'; it has .*from_pretrained"):
        omnimoe.zzzzzz  # noqa: B018

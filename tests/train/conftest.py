"""The shipped corpus, read once."""

from __future__ import annotations

import pytest

from omnimoe.data import Corpus


@pytest.fixture(scope="session")
def corpus() -> Corpus:
    return Corpus.load("p")

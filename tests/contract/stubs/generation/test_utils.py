"""In the place of the suite's generation tests, which are not distributed; ``tests/contract`` holds ours."""

from __future__ import annotations


class GenerationTesterMixin:
    """Adds nothing; the suite asks that the tests of a model that generates inherit it."""

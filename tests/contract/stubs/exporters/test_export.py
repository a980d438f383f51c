"""In the place of the suite's export tests, which are not distributed; ``tests/test_export.py`` holds ours."""

from __future__ import annotations


class ExportTesterMixin:
    """Adds nothing."""

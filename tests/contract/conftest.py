"""What lies here for transformers' own suite is no test of this run; ``python -m tests.contract.run`` runs it."""

from __future__ import annotations

collect_ignore = ["shared", "stubs"]

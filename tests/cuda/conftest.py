"""The ops of ``csrc/cuda`` on the emulator."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.cuda import emulated


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    # whoever comes first compiles the kernels, for which a busy machine needs longer than a test may take
    for item in items:
        if Path(__file__).parent in item.path.parents and item.get_closest_marker("timeout") is None:
            item.add_marker(pytest.mark.timeout(1800))


@pytest.fixture(scope="session")
def ops() -> Any:
    """As ``torch.ops.omnimoe`` has them, for CPU tensors."""
    emulated.load()
    return torch.ops.omnimoe_emulated

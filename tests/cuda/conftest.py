"""The ops of ``csrc/cuda`` on the emulator."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.cuda import emulated


@pytest.fixture(scope="session")
def ops() -> Any:
    """As ``torch.ops.omnimoe`` has them, for CPU tensors."""
    emulated.load()
    return torch.ops.omnimoe_emulated

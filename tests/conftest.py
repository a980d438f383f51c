"""What holds in every test: fixed seeds, one thread, no network, an own cache, and no luck with fresh memory."""

from __future__ import annotations

import os

# Libraries read these as they are imported.
os.environ.update(
    HF_HUB_OFFLINE="1",
    HF_HUB_DISABLE_TELEMETRY="1",
    TOKENIZERS_PARALLELISM="false",
    OMP_NUM_THREADS="1",
    MKL_NUM_THREADS="1",
    MPLBACKEND="Agg",
)

import random
from collections.abc import Callable, Iterator
from functools import wraps
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import settings
from torch._dynamo.trace_rules import get_torch_obj_rule_map
from torch.utils._device import _device_constructors

from tests.hazard_rows import COLLECTED, collected

torch.set_num_threads(1)

# A shared machine misses deadlines, and a run that fails must fail again.
settings.register_profile("omnimoe", deadline=None, derandomize=True)
settings.load_profile("omnimoe")

# As a context, torch.device("meta") knows constructors by identity, and so does torch.compile; both collect them once,
# which must be before any is wrapped.
_device_constructors()
get_torch_obj_rule_map()

_FLOATING = (torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64, torch.complex128)
_INTEGER = (torch.int16, torch.int32, torch.int64)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    # before -m takes any away: slow cases count too
    config.stash[COLLECTED] = collected(items)
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)


def pytest_configure(config: pytest.Config) -> None:
    # built once for all workers and later runs; a file's name says which sources it is of
    if "OMNIMOE_KERNELS" not in os.environ:
        os.environ["OMNIMOE_KERNELS"] = str(config.rootpath / ".pytest_cache" / "kernels")


@pytest.fixture(scope="session")
def compiled() -> None:
    """Skips where the compiled CPU kernels are not there and cannot be built."""
    from omnimoe.ops import missing_kernels

    if missing_kernels():
        pytest.skip(missing_kernels())


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """One cache a session, so that what is built on first use is built once, and the user's own is never touched."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMNIMOE_CACHE", str(tmp_path_factory.mktemp("omnimoe-cache")))
        yield


@pytest.fixture
def cache_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache folder for this test alone."""
    folder = tmp_path / "cache"
    folder.mkdir()
    monkeypatch.setenv("OMNIMOE_CACHE", str(folder))
    return folder


@pytest.fixture(autouse=True)
def _seeds() -> None:
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture
def device() -> torch.device:
    """The fastest device here."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(autouse=True)
def _poisoned_empty(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fresh memory holds NaN, or integers no index can be, so that a row nobody wrote is seen and not zero by luck.

    The idea is flash-linear-attention's. It reaches what is allocated from Python, not from compiled kernels.
    """
    for owner, name in ((torch, "empty"), (torch, "empty_like"), (torch, "empty_strided"), (torch.Tensor, "new_empty")):
        monkeypatch.setattr(owner, name, _poisoned(getattr(owner, name)))


def _poisoned(allocate: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    @wraps(allocate)
    def allocate_and_fill(*args: Any, **kwargs: Any) -> torch.Tensor:
        fresh = allocate(*args, **kwargs)
        if isinstance(fresh, torch.Tensor) and fresh.layout is torch.strided and not fresh.is_meta:
            with torch.no_grad():
                if fresh.dtype in _FLOATING:
                    fresh.fill_(float("nan"))
                elif fresh.dtype in _INTEGER:
                    fresh.fill_(torch.iinfo(fresh.dtype).min)
        return fresh

    return allocate_and_fill

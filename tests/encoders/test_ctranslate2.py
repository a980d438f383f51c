"""The reader of CTranslate2 files on a small one written here, whole and damaged."""

from __future__ import annotations

import struct

import numpy as np
import pytest
import torch

from omnimoe.encoders import EncoderError
from omnimoe.encoders.ctranslate2 import read_ctranslate2


def string(text: str) -> bytes:
    return struct.pack("<H", len(text) + 1) + text.encode() + b"\0"


def variable(name: str, array: np.ndarray, code: int, *, size: int | None = None) -> bytes:
    sizes = struct.pack(f"<B{array.ndim}I", array.ndim, *array.shape)
    return string(name) + sizes + struct.pack("<BI", code, array.nbytes if size is None else size) + array.tobytes()


MATRIX = np.arange(6, dtype=np.float16).reshape(2, 3)
COUNT = np.array(7, np.int16)


def file(*variables: bytes, version: int = 6, spec: str = "WhisperSpec", alias: tuple[str, str] = ("b", "a")) -> bytes:
    head = struct.pack("<I", version) + string(spec) + struct.pack("<II", 3, len(variables))
    return head + b"".join(variables) + struct.pack("<I", 1) + string(alias[0]) + string(alias[1])


WHOLE = file(variable("a", MATRIX, 4), variable("count", COUNT, 2))


@pytest.fixture
def read(tmp_path):
    def read_bytes(content: bytes):
        path = tmp_path / "model.bin"
        path.write_bytes(content)
        return read_ctranslate2(path, "WhisperSpec")

    return read_bytes


def test_variables_and_aliases(read):
    found = read(WHOLE)
    assert set(found) == {"a", "b", "count"}
    assert torch.equal(found["a"], torch.from_numpy(MATRIX))
    assert found["b"] is found["a"]
    assert found["count"].item() == 7


@pytest.mark.parametrize("length", range(0, len(WHOLE), 3))
def test_a_file_cut_short_is_refused(read, length):
    with pytest.raises(EncoderError, match="ends early"):
        read(WHOLE[:length])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (file(version=5), "file version 5"),
        (file(spec="TransformerSpec"), "a 'TransformerSpec', not a 'WhisperSpec'"),
        (file(variable("a", MATRIX, 9)), "unknown dtype 9"),
        (file(variable("a", MATRIX, 4, size=10)), r"shape \[2, 3\] and dtype float16 has 10 bytes"),
        (file(variable("a", MATRIX, 4), variable("a", MATRIX, 4)), "stands twice"),
        (file(variable("a", MATRIX, 4), alias=("b", "c")), "'b' stands for 'c'"),
        (file(string("a") + b"\xff"), "rank 255"),
        (file(variable("é", MATRIX, 4)[:-5]), "no text"),
        (WHOLE + b"\0", "1 bytes more"),
        (file(string("a") + struct.pack("<B4IBI", 4, *[2**32 - 1] * 4, 4, 0)), "has 0 bytes"),
    ],
)
def test_a_damaged_file_is_refused(read, content, message):
    with pytest.raises(EncoderError, match=message):
        read(content)

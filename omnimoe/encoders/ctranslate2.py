"""Reads the weight files of CTranslate2, which the library itself offers no way to get tensors from.

The layout of version 6, little-endian: version, name and revision of the model's form; a count of variables, each a
name, a rank and its sizes, a dtype and a length in bytes, then the bytes; a count of aliases, pairs of names. Every
length is held against what is left of the file before it is used.

Source: ``python/ctranslate2/specs/model_spec.py`` of https://github.com/OpenNMT/CTranslate2.
"""

from __future__ import annotations

import math
import struct
from os import PathLike, fspath
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from omnimoe.encoders.base import EncoderError

_DTYPES = {0: np.float32, 1: np.int8, 2: np.int16, 3: np.int32, 4: np.float16}
_MAX_RANK = 8


class _Reader:
    """Takes numbers, strings and blocks off the front of a file's bytes."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.content = memoryview(path.read_bytes())
        self.place = 0

    def block(self, size: int) -> memoryview:
        if size > len(self.content) - self.place:
            left = len(self.content) - self.place
            raise EncoderError(f"{self.path} ends early: {size} bytes are wanted at {self.place}, and {left} are left")
        self.place += size
        return self.content[self.place - size : self.place]

    def number(self, code: str) -> int:
        return struct.unpack(f"<{code}", self.block(struct.calcsize(code)))[0]

    def string(self) -> str:
        # a length of 2 bytes, then text that ends in a zero byte
        text = bytes(self.block(self.number("H")))
        try:
            return text.rstrip(b"\0").decode("ascii")
        except UnicodeDecodeError as error:
            raise EncoderError(f"{self.path} holds a name that is no text: {text[:40]!r}") from error


def read_ctranslate2(path: str | PathLike[str], spec: str) -> dict[str, Tensor]:
    """The variables of a CTranslate2 model.

    Args:
        path: a ``model.bin``.
        spec: the form the model must have, ``"WhisperSpec"``.

    Returns:
        Name to tensor, in the dtype of the file; an alias is the same tensor under another name.

    Raises:
        EncoderError: if the file is of another version or form, or damaged.
    """
    reader = _Reader(Path(fspath(path)))
    version = reader.number("I")
    if version != 6:
        raise EncoderError(f"{path} is of CTranslate2's file version {version}; only 6 can be read")
    found, _ = reader.string(), reader.number("I")
    if found != spec:
        raise EncoderError(f"{path} holds a {found!r}, not a {spec!r}")
    tensors: dict[str, Tensor] = {}
    for _ in range(reader.number("I")):
        name, rank = reader.string(), reader.number("B")
        if rank > _MAX_RANK or name in tensors:
            raise EncoderError(f"{path}: variable {name!r} of rank {rank} is malformed or stands twice")
        shape = [reader.number("I") for _ in range(rank)]
        code, size = reader.number("B"), reader.number("I")
        if code not in _DTYPES:
            raise EncoderError(f"{path}: variable {name!r} has the unknown dtype {code}")
        dtype = np.dtype(_DTYPES[code])
        if math.prod(shape) * dtype.itemsize != size:
            raise EncoderError(f"{path}: variable {name!r} of shape {shape} and dtype {dtype} has {size} bytes")
        tensors[name] = torch.from_numpy(np.frombuffer(reader.block(size), dtype).reshape(shape).copy())
    for _ in range(reader.number("I")):
        alias, name = reader.string(), reader.string()
        if name not in tensors:
            raise EncoderError(f"{path}: {alias!r} stands for {name!r}, which is not there")
        tensors[alias] = tensors[name]
    if reader.place != len(reader.content):
        raise EncoderError(f"{path} holds {len(reader.content) - reader.place} bytes more than it should")
    return tensors

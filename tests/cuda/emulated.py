"""The kernels of ``csrc/cuda`` on the emulator: g++ compiles them, with their op file, into ops on CPU tensors.

A library is kept under a name that is a digest of what it is made of, as the real ones are.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from omnimoe.ops import _extension
from omnimoe.ops._library import SCHEMAS

ROOT = Path(__file__).parents[2]
FOLDERS = (ROOT / "csrc" / "cuda", ROOT / "tests" / "cuda" / "emulator")
ORDERS = ("fair", "eager", "reversed", "shuffled")
"""How threads take turns; see emulator::Order."""


def compile_library(source: str, *flags: str) -> Path:
    """A shared library of one file of ``tests/cuda/emulator``; skips the test where there is no g++."""
    if shutil.which("g++") is None:
        pytest.skip("the emulator is compiled by g++, which is not here")
    torch_folder = Path(torch.__file__).parent
    command = [
        "g++", "-std=c++20", "-O1", "-fPIC", "-shared", "-fvisibility=hidden", "-Wall", "-Wextra", "-Werror",
        "-Wno-unknown-pragmas", _extension.FLAGS[-1], *flags, "-isystem", str(torch_folder / "include"),
        *(f"-I{folder}" for folder in (FOLDERS[0], ROOT / "tests" / "cuda")), str(FOLDERS[1] / source),
        f"-L{torch_folder / 'lib'}", "-ltorch_cpu",
    ]  # fmt: skip
    digest = hashlib.sha256(repr(command).encode())
    for file in sorted(file for folder in FOLDERS for file in folder.iterdir()):
        digest.update(file.name.encode() + file.read_bytes())
    folder = Path(os.environ["OMNIMOE_KERNELS"])
    library = folder / f"emulated-{Path(source).stem}-{digest.hexdigest()[:16]}.so"
    if not library.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            made = Path(scratch) / library.name
            done = subprocess.run([*command, "-o", str(made)], capture_output=True, text=True, check=False)
            assert done.returncode == 0, done.stderr[-4000:]
            os.replace(made, library)
    return library


@functools.cache
def _define() -> torch.library.Library:
    library = torch.library.Library("omnimoe_emulated", "DEF")
    for schema in SCHEMAS:
        library.define(schema)
    return library


@functools.cache
def load() -> ctypes.CDLL:
    """Loads the ops as ``torch.ops.omnimoe_emulated``; gives the library for what is not an op."""
    _define()
    path = compile_library("library.cpp", "-DOMNIMOE_LIBRARY=omnimoe_emulated")
    torch.ops.load_library(str(path))
    return ctypes.CDLL(str(path))


@contextmanager
def turns(order: str, seed: int = 0) -> Iterator[None]:
    """Within it, threads take turns in this order."""
    load().set_order(ORDERS.index(order), seed)
    try:
        yield
    finally:
        load().set_order(0, 0)

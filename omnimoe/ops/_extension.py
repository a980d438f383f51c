"""The compiled CPU kernels: where they lie, how they are built, and why they are not there.

``setup.py`` builds them where PyTorch and a C++ compiler are at hand at install time. Otherwise they are built on
first use, once, into the user's cache. The file's name holds a digest of sources, flags and machine, so that another
version never takes it for its own, and it is put there by renaming, so that two processes may build at once. PyTorch
is used through its stable ABI alone: one build serves 2.11 and later.

``OMNIMOE_BUILD=0`` builds nothing; ``OMNIMOE_KERNELS`` names the folder of what is built on first use, which is
``kernels`` in ``OMNIMOE_CACHE`` or ``~/.cache/omnimoe`` otherwise; ``CXX`` names the compiler.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import importlib.util
import logging
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

logger = logging.getLogger(__name__)

FLAGS = (
    "-std=c++20", "-O3", "-fPIC", "-fvisibility=hidden", "-Wno-maybe-uninitialized", "-Wno-uninitialized",
    "-DTORCH_TARGET_VERSION=0x020b000000000000",
)  # fmt: skip
AVX2 = ("-mavx2", "-mfma", "-mf16c")
AVX512 = (*AVX2, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl")
SETS = {"avx2": AVX2, "avx512": AVX512, "avx512bf16": (*AVX512, "-mavx512bf16")}
"""Instruction set to the flags that ``cpu/kernels.cpp`` is compiled with for it; each is an object of its own."""
SOURCES = ("cpu/ops.cpp", "cpu/rows.cpp", "cpu/buffers.cpp", "cpu/dispatch.cpp")
"""Compiled once, without flags of an instruction set."""
MACHINES = ("x86_64", "amd64")


class BuildError(RuntimeError):
    """The kernels cannot be built here; the message says why."""


@dataclass(frozen=True)
class Extension:
    """What became of the kernels.

    Args:
        path: the library, or None.
        instructions: the instruction set that is used: ``"avx512bf16"``, ``"avx512"`` or ``"avx2"``.
        reason: why there are none; empty where there are.
    """

    path: Path | None = None
    instructions: str = ""
    reason: str = ""


@functools.cache
def extension() -> Extension:
    """Loads the kernels, building them if need be; once in a process."""
    try:
        path = find() or _build_on_first_use()
    except BuildError as error:
        logger.info("no compiled CPU kernels: %s", error)
        return Extension(reason=str(error))
    import torch

    try:
        torch.ops.load_library(str(path))
        told = ctypes.CDLL(str(path)).omnimoe_cpu_kernels
    except (OSError, AttributeError) as error:
        return Extension(reason=f"{path} cannot be loaded: {error}")
    told.restype = ctypes.c_char_p
    instructions = told().decode()
    if instructions == "none":
        return Extension(reason="this processor has no AVX2")
    return Extension(path=path, instructions=instructions)


def find() -> Path | None:
    """The library for this machine, if it has been built: beside the package, or in the cache."""
    try:
        name = library_name()
    except BuildError:
        return None
    for folder in (Path(__file__).parent / "built", cache_folder()):
        if (folder / name).is_file():
            return folder / name
    return None


def build(folder: Path) -> Path:
    """Builds the library into ``folder``, where it appears when it is complete.

    Raises:
        BuildError: if sources, PyTorch or a compiler are missing, or the compiler fails.
    """
    name, sources, compiler = library_name(), source_folder(), find_compiler()
    found = importlib.util.find_spec("torch")
    if found is None or not found.submodule_search_locations:
        raise BuildError("PyTorch is not installed where the kernels are built")
    torch = Path(found.submodule_search_locations[0])
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".building-") as scratch:
        headers = ("-isystem", str(torch / "include"))
        units: list[tuple[str, str, tuple[str, ...]]] = [(source, Path(source).stem, headers) for source in SOURCES]
        units += [("cpu/kernels.cpp", kind, (*flags, f"-DOMNIMOE_ISA={kind}")) for kind, flags in SETS.items()]
        objects = [Path(scratch) / f"{stem}.o" for _, stem, _ in units]
        commands = [
            [*compiler, *FLAGS, *flags, "-c", str(sources / source), "-o", str(made)]
            for (source, _, flags), made in zip(units, objects, strict=True)
        ]
        # the longest first, so that they do not wait for the others
        with ThreadPoolExecutor(max_workers=max(1, min(len(commands), os.cpu_count() or 1))) as pool:
            list(pool.map(_run, reversed(commands)))
        library = Path(scratch) / name
        linked = [*compiler, "-shared", "-o", str(library), *map(str, objects), f"-L{torch / 'lib'}", "-ltorch_cpu"]
        _run(linked)
        os.replace(library, folder / name)
    return folder / name


def library_name() -> str:
    """The file name of the library that these sources, flags, compiler and machine give.

    Raises:
        BuildError: on another kind of processor, or if the sources are missing.
    """
    machine = platform.machine().lower()
    if machine not in MACHINES or os.name != "posix":
        raise BuildError(f"the CPU kernels are for x86-64 under Linux, this is {platform.system()} on {machine}")
    digest = hashlib.sha256(repr((FLAGS, sorted(SETS.items()), machine, platform.system())).encode())
    folder = source_folder()
    for file in sorted(file for file in (folder / "cpu").rglob("*") if file.suffix in (".cpp", ".h")):
        digest.update(str(file.relative_to(folder)).encode() + file.read_bytes())
    return f"omnimoe_cpu-{digest.hexdigest()[:16]}.so"


def source_folder() -> Path:
    """``csrc``: inside the installed package, or at the top of a checkout.

    Raises:
        BuildError: if it is nowhere.
    """
    package = Path(__file__).parents[1]
    for folder in (package / "csrc", package.parent / "csrc"):
        if (folder / "cpu" / "ops.cpp").is_file():
            return folder
    raise BuildError("the C++ sources are not installed with the package")


def find_compiler() -> list[str]:
    """The C++ compiler as a command: ``CXX``, or g++, clang++ or c++.

    Raises:
        BuildError: if there is none.
    """
    wanted = os.environ.get("CXX")
    for command in [shlex.split(wanted)] if wanted else [["g++"], ["clang++"], ["c++"]]:
        if command and shutil.which(command[0]):
            return command
    raise BuildError(f"there is no C++ compiler ({wanted or 'g++, clang++ or c++'})")


def cache_folder() -> Path:
    """Where kernels that were built on first use are kept."""
    if own := os.environ.get("OMNIMOE_KERNELS"):
        return Path(own)
    top = os.environ.get("OMNIMOE_CACHE")
    return (Path(top) if top else Path.home() / ".cache" / "omnimoe") / "kernels"


def _build_on_first_use() -> Path:
    if os.environ.get("OMNIMOE_BUILD") == "0":
        raise BuildError("they are not built, and OMNIMOE_BUILD=0 forbids to build them on first use")
    find_compiler()
    logger.warning("building the CPU kernels, once, into %s: about half a minute", cache_folder())
    try:
        return build(cache_folder())
    except OSError as error:
        raise BuildError(f"they cannot be built: {error}") from error


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        told = done.stderr.strip().splitlines()
        first = next((line for line in told if "error" in line), told[0] if told else f"exit {done.returncode}")
        raise BuildError(f"{command[0]} failed: {first.strip()[:300]}")

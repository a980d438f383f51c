"""The compiled kernels, for CPUs and for CUDA: where their libraries lie, how they are built, and why they are missing.

``setup.py`` builds them where PyTorch and a compiler are at hand at install time. Otherwise they are built on first
use, once, into the user's cache; those for CUDA where there are a CUDA device and ``nvcc``, or anywhere with ``nvcc``
by ``omnimoe build --cuda``. The file's name holds a digest of sources, flags and machine, so that another version never
takes it for its own, and it is put there by renaming, so that two processes may build at once. PyTorch is used through
its stable ABI alone: one build serves 2.11 and later.

``OMNIMOE_BUILD=0`` builds nothing; ``OMNIMOE_KERNELS`` names the folder of what is built on first use, which is
``kernels`` in ``OMNIMOE_CACHE`` or ``~/.cache/omnimoe`` otherwise; ``CXX`` and ``NVCC`` name the compilers.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import importlib.util
import logging
import os
import platform
import re
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
SOURCES = tuple(f"cpu/{name}.cpp" for name in ("ops", "rows", "norm", "attend", "scan", "buffers", "dispatch"))
"""Compiled once, without flags of an instruction set."""
MACHINES = ("x86_64", "amd64")

CUDA_FLAGS = (
    "-std=c++20", "-O3", "-Xcompiler=-fPIC,-fvisibility=hidden", "-DUSE_CUDA", FLAGS[-1], "--cudart=static",
    "-gencode=arch=compute_80,code=[sm_80,compute_80]", "-gencode=arch=compute_90a,code=sm_90a",
)  # fmt: skip
"""Of ``nvcc``: machine code for compute capability 8.x and 9.0, and code that the driver compiles for later ones."""
CUDA_FLOOR = (8, 0)
SUFFIXES = {"cpu": (".cpp", ".h"), "cuda": (".cu", ".h")}
"""Kind of library to what its sources end with."""
ENTRIES = {"cpu": "omnimoe_cpu_kernels", "cuda": "omnimoe_cuda_kernels"}
"""Kind of library to the function that says what is in it."""
DURATIONS = {"cpu": "about half a minute", "cuda": "a minute or two"}


class BuildError(RuntimeError):
    """The kernels cannot be built here; the message says why."""


@dataclass(frozen=True)
class Extension:
    """What became of the kernels.

    Args:
        path: the library, or None.
        instructions: the instruction set that is used: ``"avx512bf16"``, ``"avx512"`` or ``"avx2"``; of CUDA those
            that are there, ``"sm_80"`` or ``"sm_80 sm_90a"``.
        reason: why there are none; empty where there are.
    """

    path: Path | None = None
    instructions: str = ""
    reason: str = ""


def extension(kind: str = "cpu") -> Extension:
    """Loads the kernels for ``"cpu"`` or ``"cuda"``, building them if need be; once in a process."""
    return _extension(kind)


@functools.cache
def _extension(kind: str) -> Extension:
    try:
        if kind == "cuda":
            _check_device()
        path = find(kind) or _build_on_first_use(kind)
    except BuildError as error:
        logger.info("no compiled %s kernels: %s", kind.upper(), error)
        return Extension(reason=str(error))
    import torch

    try:
        torch.ops.load_library(str(path))
        told = getattr(ctypes.CDLL(str(path)), ENTRIES[kind])
    except (OSError, AttributeError) as error:
        return Extension(reason=f"{path} cannot be loaded: {error}")
    told.restype = ctypes.c_char_p
    instructions = told().decode()
    if instructions == "none":
        return Extension(reason="this processor has no AVX2")
    return Extension(path=path, instructions=instructions)


def find(kind: str = "cpu") -> Path | None:
    """The library for this machine, if it has been built: beside the package, or in the cache."""
    try:
        name = library_name(kind)
    except BuildError:
        return None
    for folder in (Path(__file__).parent / "built", cache_folder()):
        if (folder / name).is_file():
            return folder / name
    return None


def build(folder: Path, kind: str = "cpu") -> Path:
    """Builds a library into ``folder``, where it appears when it is complete.

    Args:
        folder: made if need be.
        kind: ``"cpu"`` or ``"cuda"``. No device is needed for the latter.

    Raises:
        BuildError: if sources, PyTorch or a compiler are missing, or the compiler fails.
    """
    name, sources = library_name(kind), source_folder()
    compiler = find_nvcc() if kind == "cuda" else find_compiler()
    torch = torch_folder()
    libraries = [f"-L{torch / 'lib'}", "-ltorch_cpu"]
    if kind == "cuda":
        if not is_cuda_torch():
            raise BuildError("this PyTorch is built without CUDA")
        # a package's compiler does not look where the packages' libraries are
        beside = Path(shutil.which(compiler[0]) or compiler[0]).resolve().parents[1] / "lib"
        libraries += ["-ltorch_cuda", "--cudart=static", "--cudadevrt=none", f"-L{beside}"]
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".building-") as scratch:
        headers = ("-isystem", str(torch / "include"))
        units = _cuda_units(sources, headers) if kind == "cuda" else _cpu_units(headers)
        objects = [Path(scratch) / f"{stem}.o" for _, stem, _ in units]
        commands = [
            [*compiler, *flags, "-c", str(sources / source), "-o", str(made)]
            for (source, _, flags), made in zip(units, objects, strict=True)
        ]
        # the longest first, so that they do not wait for the others
        with ThreadPoolExecutor(max_workers=max(1, min(len(commands), os.cpu_count() or 1))) as pool:
            list(pool.map(_run, reversed(commands)))
        library = Path(scratch) / name
        _run([*compiler, "-shared", "-o", str(library), *map(str, objects), *libraries])
        os.replace(library, folder / name)
    return folder / name


Unit = tuple[str, str, tuple[str, ...]]
"""A source file under ``csrc``, the name of its object, and the flags."""


def _cpu_units(headers: tuple[str, ...]) -> list[Unit]:
    sets = [("cpu/kernels.cpp", kind, (*FLAGS, *flags, f"-DOMNIMOE_ISA={kind}")) for kind, flags in SETS.items()]
    return [*((source, Path(source).stem, (*FLAGS, *headers)) for source in SOURCES), *sets]


def _cuda_units(sources: Path, headers: tuple[str, ...]) -> list[Unit]:
    kernels = sorted(file.name for file in (sources / "cuda").glob("*.cu"))
    has_hopper = any(name.startswith("sm90") for name in kernels)
    flags = (*CUDA_FLAGS, *headers, *(["-DOMNIMOE_SM90"] if has_hopper else []))
    return [(f"cuda/{name}", Path(name).stem, flags) for name in kernels]


def library_name(kind: str = "cpu") -> str:
    """The file name of the library that these sources, flags, compiler and machine give.

    Raises:
        BuildError: on another kind of processor, or if the sources are missing.
    """
    machine = platform.machine().lower()
    if os.name != "posix" or (kind == "cpu" and machine not in MACHINES):
        wanted = "x86-64 under Linux" if kind == "cpu" else "Linux"
        raise BuildError(f"the {kind.upper()} kernels are for {wanted}, this is {platform.system()} on {machine}")
    flags = (CUDA_FLAGS,) if kind == "cuda" else (FLAGS, sorted(SETS.items()))
    digest = hashlib.sha256(repr((*flags, machine, platform.system())).encode())
    folder = source_folder() / kind
    for file in sorted(file for file in folder.rglob("*") if file.suffix in SUFFIXES[kind]):
        digest.update(str(file.relative_to(folder)).encode() + file.read_bytes())
    return f"omnimoe_{kind}-{digest.hexdigest()[:16]}.so"


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


def find_nvcc() -> list[str]:
    """The CUDA compiler as a command: ``NVCC``, a toolkit's, or that of the package ``nvidia-cuda-nvcc``.

    Raises:
        BuildError: if there is none, or one without C++20 and Hopper, which come with CUDA 12.
    """
    folders = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    paths = [shutil.which("nvcc"), *(str(Path(folder) / "bin" / "nvcc") for folder in folders if folder)]
    packages = importlib.util.find_spec("nvidia")
    for folder in (packages.submodule_search_locations or []) if packages else []:
        paths += sorted(str(file) for file in Path(folder).glob("*/bin/nvcc"))
    wanted = os.environ.get("NVCC")
    for command in [shlex.split(wanted)] if wanted else [[path] for path in paths if path]:
        if not command or not shutil.which(command[0]):
            continue
        told = subprocess.run([*command, "--version"], capture_output=True, text=True, check=False).stdout
        release = re.search(r"release (\d+)\.(\d+)", told)
        if release is None or int(release[1]) < 12:
            raise BuildError(f"{command[0]} is of CUDA {release[0] if release else 'unknown'}; 12 is needed")
        return command if "CXX" not in os.environ else [*command, f"-ccbin={find_compiler()[0]}"]
    raise BuildError(f"there is no CUDA compiler ({wanted or 'nvcc, of a toolkit or the package nvidia-cuda-nvcc'})")


def torch_folder() -> Path:
    """Where PyTorch is installed.

    Raises:
        BuildError: if it is not.
    """
    found = importlib.util.find_spec("torch")
    if found is None or not found.submodule_search_locations:
        raise BuildError("PyTorch is not installed where the kernels are built")
    return Path(found.submodule_search_locations[0])


def is_cuda_torch() -> bool:
    """Whether PyTorch is installed with its CUDA part, which needs no device."""
    try:
        return (torch_folder() / "lib" / "libtorch_cuda.so").is_file()
    except BuildError:
        return False


def cache_folder() -> Path:
    """Where kernels that were built on first use are kept."""
    if own := os.environ.get("OMNIMOE_KERNELS"):
        return Path(own)
    top = os.environ.get("OMNIMOE_CACHE")
    return (Path(top) if top else Path.home() / ".cache" / "omnimoe") / "kernels"


def _check_device() -> None:
    import torch

    if not is_cuda_torch():
        raise BuildError("this PyTorch is built without CUDA")
    if not torch.cuda.is_available():
        raise BuildError("there is no CUDA device")
    best = max(torch.cuda.get_device_capability(index) for index in range(torch.cuda.device_count()))
    if best < CUDA_FLOOR:
        raise BuildError(f"the device is of compute capability {best[0]}.{best[1]}; the kernels need 8.0")


def _build_on_first_use(kind: str) -> Path:
    if os.environ.get("OMNIMOE_BUILD") == "0":
        raise BuildError("they are not built, and OMNIMOE_BUILD=0 forbids to build them on first use")
    _ = find_nvcc() if kind == "cuda" else find_compiler()
    logger.warning("building the %s kernels, once, into %s: %s", kind.upper(), cache_folder(), DURATIONS[kind])
    try:
        return build(cache_folder(), kind)
    except OSError as error:
        raise BuildError(f"they cannot be built: {error}") from error


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        told = done.stderr.strip().splitlines()
        first = next((line for line in told if "error" in line), told[0] if told else f"exit {done.returncode}")
        raise BuildError(f"{command[0]} failed: {first.strip()[:300]}")

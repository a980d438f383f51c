"""Packages, data and compiled kernels; everything declarative is in ``pyproject.toml``.

``zoo/`` and ``csrc/`` lie beside ``omnimoe/`` and are installed as ``omnimoe.zoo`` and ``omnimoe.csrc``, in a wheel and
in an editable install alike.

The kernels for CPUs are built here if PyTorch and a C++ compiler are at hand, which in an isolated build they are not;
those for CUDA if that PyTorch has CUDA and ``nvcc`` is found, unless ``OMNIMOE_CUDA=0``. No device is asked for. No
install fails for want of them: what is missing is built on first use, from the sources that are always installed.
"""

import importlib.util
import os
import sys
from pathlib import Path

from setuptools import Distribution, find_packages, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_py import build_py

PACKAGES = [
    *find_packages(include=["omnimoe", "omnimoe.*"]),
    "omnimoe.zoo",
    *(f"omnimoe.zoo.{name}" for name in find_packages("zoo")),
    "omnimoe.csrc",
]

# Data is listed, never swept up from what git tracks, so that what a wheel holds is decided here alone.
PACKAGE_DATA = {
    "omnimoe": ["py.typed"],
    "omnimoe.data": ["*.md", "shipped/**"],
    "omnimoe.tokenizers": ["*.md", "weights/**"],
    "omnimoe.zoo": ["**/README.md", "**/weights/**"],
    "omnimoe.csrc": ["**/*.cpp", "**/*.cu", "**/*.h"],
}


def load_builder():
    """``omnimoe/ops/_extension.py`` by itself, without the package and what it needs."""
    file = Path(__file__).parent / "omnimoe" / "ops" / "_extension.py"
    spec = importlib.util.spec_from_file_location("_omnimoe_extension", file)
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def kinds_to_build(builder):
    """The libraries of kernels that can be built here."""
    if importlib.util.find_spec("torch") is None:
        return []
    found = []
    for kind, find_compiler in (("cpu", builder.find_compiler), ("cuda", builder.find_nvcc)):
        if kind == "cuda" and (os.environ.get("OMNIMOE_CUDA") == "0" or not builder.is_cuda_torch()):
            continue
        try:
            builder.library_name(kind)
            find_compiler()
        except builder.BuildError:
            continue
        found.append(kind)
    return found


class BuildWithKernels(build_py):
    """Builds the kernels beside the modules, into ``omnimoe/ops/built``."""

    def run(self):
        super().run()
        if self.editable_mode:
            return
        builder = load_builder()
        kinds = kinds_to_build(builder)
        if os.environ.get("OMNIMOE_CUDA") == "1" and "cuda" not in kinds:
            self.announce("OMNIMOE_CUDA=1, but the CUDA kernels need nvcc and a PyTorch with CUDA to be built", 2)
        for kind in kinds:
            try:
                self.announce(f"built {builder.build(Path(self.build_lib) / 'omnimoe' / 'ops' / 'built', kind)}", 2)
            except (builder.BuildError, OSError) as error:
                self.announce(f"no {kind.upper()} kernels: {error}; they are built on first use, if they can be", 2)


class MaybeCompiled(Distribution):
    """Says whether kernels will be in the wheel, which then is for one kind of machine."""

    def has_ext_modules(self):
        return bool(kinds_to_build(load_builder()))


class AnyPython(bdist_wheel):
    """The kernels use no symbol of Python, so one wheel serves all versions."""

    def get_tag(self):
        tag = super().get_tag()
        return ("py3", "none", tag[2]) if self.distribution.has_ext_modules() else tag


if __name__ == "__main__":
    setup(
        packages=PACKAGES,
        package_dir={"omnimoe.zoo": "zoo", "omnimoe.csrc": "csrc"},
        package_data=PACKAGE_DATA,
        include_package_data=False,
        distclass=MaybeCompiled,
        cmdclass={"build_py": BuildWithKernels, "bdist_wheel": AnyPython},
    )

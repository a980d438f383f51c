"""Packages, data and compiled kernels; everything declarative is in ``pyproject.toml``.

``zoo/`` and ``csrc/`` lie beside ``omnimoe/`` and are installed as ``omnimoe.zoo`` and ``omnimoe.csrc``, in a wheel and
in an editable install alike.

The CPU kernels are built here if PyTorch and a C++ compiler are at hand, which in an isolated build they are not. No
install fails for want of them: what is missing is built on first use, from the sources that are always installed.
"""

import importlib.util
import shutil
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


class BuildWithKernels(build_py):
    """Builds the kernels beside the modules, into ``omnimoe/ops/built``."""

    def run(self):
        super().run()
        if self.editable_mode or not self.distribution.has_ext_modules():
            return
        builder = load_builder()
        try:
            self.announce(f"built {builder.build(Path(self.build_lib) / 'omnimoe' / 'ops' / 'built')}", 2)
        except (builder.BuildError, OSError) as error:
            self.announce(f"no compiled kernels: {error}; they are built on first use, if they can be", 2)


class MaybeCompiled(Distribution):
    """Says whether kernels will be in the wheel, which then is for one kind of machine."""

    def has_ext_modules(self):
        builder = load_builder()
        try:
            builder.library_name()
            has_compiler = shutil.which(builder.find_compiler()[0]) is not None
        except builder.BuildError:
            return False
        return has_compiler and importlib.util.find_spec("torch") is not None


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

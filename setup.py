"""Packages and data; everything declarative is in ``pyproject.toml``.

``zoo/`` lies beside ``omnimoe/`` and is installed as ``omnimoe.zoo``, in a wheel and in an editable install alike.
"""

from setuptools import find_packages, setup

PACKAGES = [
    *find_packages(include=["omnimoe", "omnimoe.*"]),
    "omnimoe.zoo",
    *(f"omnimoe.zoo.{name}" for name in find_packages("zoo")),
]

# Data is listed, never swept up from what git tracks, so that what a wheel holds is decided here alone.
PACKAGE_DATA = {
    "omnimoe": ["py.typed"],
    "omnimoe.data": ["*.md", "shipped/**"],
    "omnimoe.tokenizers": ["*.md", "weights/**"],
    "omnimoe.zoo": ["**/README.md", "**/weights/**"],
}

# Compiled kernels from csrc/ are to be listed here.
EXT_MODULES = []

if __name__ == "__main__":
    setup(
        packages=PACKAGES,
        package_dir={"omnimoe.zoo": "zoo"},
        package_data=PACKAGE_DATA,
        include_package_data=False,
        ext_modules=EXT_MODULES,
    )

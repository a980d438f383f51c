"""Whether the files of a folder are those that a save wrote, bit for bit."""

from __future__ import annotations

import re
from collections.abc import Collection
from pathlib import Path

from omnimoe.checkpoint.errors import CheckpointError
from omnimoe.checkpoint.folder import inside
from omnimoe.publish import MANIFEST, digest, read_manifest


def verify_folder(folder: Path, files: Collection[str] | None = None, *, needed: Collection[str] = ()) -> None:
    """Reads every file that the manifest lists and compares its hash; other files are not looked at.

    Args:
        folder: of the checkpoint.
        files: names of those to read; all where None.
        needed: names of files that must be listed if they are there, beside ``files``: those that will be loaded.

    Raises:
        CheckpointError: if a file is missing, another one or not listed, or there is no manifest.
    """
    try:
        listed = read_manifest(folder)
    except ValueError as error:
        raise CheckpointError(str(error)) from error
    if not listed:
        raise CheckpointError(f"{folder} has no {MANIFEST} to verify it by; leave verify out, or save the model again")
    for name in sorted({*needed, *(files or ())} - set(listed)):
        if (folder / name).exists():
            raise CheckpointError(
                f"{folder / name} would be loaded, and {MANIFEST} does not list it, so nothing tells whether it is of "
                "the save; remove or fetch it again, save the model again, or leave verify out"
            )
    for name, wanted in listed.items():
        if files is not None and name not in files:
            continue
        if re.search(r"(^|[/\\])\.\.?($|[/\\])|^[/\\]|[\0:]", name):
            raise CheckpointError(
                f"{folder / MANIFEST} lists {name!r}, which is not in the folder; save the model again"
            )
        if not (folder / name).exists():
            raise CheckpointError(f"{folder / name} is missing, and {MANIFEST} lists it; fetch or copy it again")
        path = inside(folder, name)
        size = path.stat().st_size
        if size != wanted["size"]:
            raise CheckpointError(
                f"{path} has {size:,} bytes, and {wanted['size']:,} when it was saved; fetch or copy it again"
            )
        if digest(path) != wanted["sha256"]:
            raise CheckpointError(
                f"{path} is not the file that was saved: its SHA-256 differs from that in {MANIFEST}; a bit was lost, "
                "or it was changed. Fetch or copy it again, or leave verify out if the change is yours"
            )

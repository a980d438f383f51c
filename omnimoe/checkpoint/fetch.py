"""The folder of a checkpoint: a folder of the disk, or one fetched from the Hub."""

from __future__ import annotations

import re
from os import fspath
from pathlib import Path

from omnimoe.checkpoint.errors import CheckpointError
from omnimoe.model import MODELS


def folder_of(source: str, *, revision: str | None, local_files_only: bool, token: str | None) -> Path:
    """The folder of a checkpoint, fetched from the Hub where ``source`` is no folder.

    Args:
        source: an existing folder, ``local-dir:folder``, ``org/name`` or ``hf-hub:org/name``.
        revision: branch, tag or commit, on the Hub.
        local_files_only: look in the local cache alone.
        token: for private repositories.

    Raises:
        CheckpointError: if there is no such folder or repository.
    """
    prefix, _, rest = source.partition(":")
    if prefix == "local-dir" or (prefix != "hf-hub" and Path(source).is_dir()):
        folder = Path(rest if prefix == "local-dir" else source)
        if not folder.is_dir():
            raise CheckpointError(f"there is no folder {fspath(folder)!r}; name the folder of a saved model")
        return folder
    name = rest if prefix == "hf-hub" else source
    if prefix != "hf-hub" and name in MODELS:
        raise CheckpointError(f"{name!r} is a registered model, not a checkpoint; call load({name!r})")
    if not re.fullmatch(r"[\w.\-]+/[\w.\-]+", name):
        raise CheckpointError(
            f"{source!r} is neither an existing folder nor an id on the Hub (org/name), "
            f"and no registered model has that name{MODELS.hint(name)}"
        )
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(
            snapshot_download(
                name,
                revision=revision,
                token=token,
                local_files_only=local_files_only,
                allow_patterns=["*.json", "*.safetensors"],
            )
        )
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise CheckpointError(f"{name!r} could not be fetched from the Hub: {error}") from error

"""Published checkpoints to folders of ours and back, file by file: what ``omnimoe convert`` does."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from os import PathLike, fspath
from pathlib import Path
from typing import Any

from omnimoe.checkpoint import CheckpointError, Hub, Source
from omnimoe.checkpoint.header import read_header
from omnimoe.convert import CONVERTERS, find_converter, to_omnimoe, to_published
from omnimoe.convert.folders import BESIDE, check_destination
from omnimoe.convert.load import fetch_weights
from omnimoe.hub import MODELS
from omnimoe.model import OmniMoeForCausalLM
from omnimoe.publish import read_manifest

TARGETS = ("omnimoe", "published")


@dataclass(frozen=True, kw_only=True)
class Conversion:
    """What was written.

    Args:
        family: of the published layout.
        folder: where it was written.
        num_tensors: tensors in the folder.
        num_bytes: of its weights.
    """

    family: str
    folder: Path
    num_tensors: int
    num_bytes: int


def convert_checkpoint(
    source: str | PathLike[str] | OmniMoeForCausalLM,
    destination: str | PathLike[str],
    *,
    to: str = "omnimoe",
    max_shard_size: int | str | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
    local_files_only: bool = False,
    overwrite: bool = False,
    outline: bool = False,
) -> Conversion:
    """Writes a published checkpoint as one of ours, or one of ours in the layout it was published in.

    Tensors go from file to file one at a time, with the bits they have, so a checkpoint of any size is converted in the
    memory that its largest published tensor takes.

    Args:
        source: a folder, ``local-dir:folder``, an id ``org/name`` or ``hf-hub:org/name``; with ``to="published"`` also
            a model.
        destination: the folder to write. It is replaced whole or not at all; other files in it stay.
        to: ``"omnimoe"`` or ``"published"``.
        max_shard_size: bytes of a file, or words such as ``"5GB"``. Where None it is that, but for the layouts of BAGEL
            and pi0, which are one file of any size.
        revision: branch, tag or commit, on the Hub.
        token: for what is private or gated.
        local_files_only: look on the Hub's local cache alone.
        overwrite: replace the model that is in ``destination``; refused where False.
        outline: of a model, which may be on the meta device, write names, shapes and types alone. ``from_pretrained``
            loads that with ``device="meta"``, and nothing else does.

    Raises:
        CheckpointError: if the source is of no family that is known, malformed, or does not fit, or there is a model in
            ``destination``; nothing is written.
        ValueError: for another target, or an outline of what is no model.
    """
    if to not in TARGETS:
        raise ValueError(f"a checkpoint is converted to {' or '.join(map(repr, TARGETS))}, not to {to!r}")
    MODELS.names()  # the families bring their converters
    destination = Path(destination)
    if outline and not isinstance(source, OmniMoeForCausalLM):
        raise ValueError(f"outline=True is for a model, got {fspath(source)!r}; load it with device='meta' first")
    how: dict[str, Any] = {"max_shard_size": max_shard_size, "overwrite": overwrite}
    if isinstance(source, OmniMoeForCausalLM):
        if to != "published":
            raise ValueError("a model of ours is saved with save_pretrained; pass to='published' for its old layout")
        return _written(to_published(source, destination, outline=outline, **how).name, destination)
    hub = Hub(revision=revision, token=token, local_files_only=local_files_only)
    place = Source.find(source, hub=hub)
    folder = place.fetch()
    if destination.exists() and destination.resolve() == folder.resolve():
        raise CheckpointError(f"{fspath(destination)!r} is the source itself; name another folder to write")
    converter = find_converter(folder)
    if to == "published":
        if converter is not None:
            raise CheckpointError(f"{fspath(source)!r} is a checkpoint as it is published, of family {converter.name}")
        place.fetch(["*.safetensors", *_patterns(BESIDE)], at=folder)
        return _written(to_published(folder, destination, **how).name, destination)
    if converter is None:
        known = sorted(kind for name in CONVERTERS for kind in CONVERTERS.get(name).model_types or (name,))
        raise CheckpointError(
            f"{fspath(source)!r} is no checkpoint of a family that is converted, or one of omnimoe already; known: "
            f"{', '.join(known)}"
        )
    check_destination(destination, converter, overwrite)  # before hours of download
    fetch_weights(place, folder, converter)
    place.fetch(_patterns((*BESIDE, *converter.beside)), at=folder)
    to_omnimoe(folder, destination, converter, **how)
    return _written(converter.name, destination)


def _patterns(beside: Iterable[str]) -> list[str]:
    """Patterns for files that may be there, and for what is in folders."""
    return [f"{name}{end}" for name in beside for end in (("*",) if "." in name else ("*", "/*"))]


def _written(family: str, folder: Path) -> Conversion:
    files = [folder / name for name in read_manifest(folder) if name.endswith(".safetensors")]
    entries = [entry for path in files for entry in read_header(path, outline=True).values()]
    return Conversion(
        family=family, folder=folder, num_tensors=len(entries), num_bytes=sum(entry.size for entry in entries)
    )

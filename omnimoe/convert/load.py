"""``from_pretrained`` of a checkpoint of another family: fetched, checked and converted on the way into memory."""

from __future__ import annotations

import contextlib
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from omnimoe.checkpoint import CheckpointError, Source
from omnimoe.checkpoint.finite import check_choice
from omnimoe.checkpoint.finite import check_finite as look_for_nan
from omnimoe.checkpoint.manifest import verify_folder
from omnimoe.checkpoint.pickles import has_pickles_alone
from omnimoe.convert.converter import Converter
from omnimoe.convert.files import file_names, write_outline
from omnimoe.convert.published import Published
from omnimoe.model import OmniMoeForCausalLM


def fetch_below(place: Source, folder: Path, converter: Converter) -> None:
    """Fetches the JSON files of the folders below, where a checkpoint of the family has such."""
    files = (*converter.json_files, *converter.weight_files.values())
    below = sorted({name.rpartition("/")[0] for name in files if "/" in name})
    if below:
        place.fetch([f"{part}/*.json" for part in below], at=folder)


def fetch_weights(place: Source, folder: Path, converter: Converter) -> None:
    """Fetches the weights of a checkpoint whose other files are in the folder."""
    fetch_below(place, folder, converter)
    for names in file_names(folder, converter.weight_files).values():
        place.fetch(names, at=folder)


@contextlib.contextmanager
def outlined(place: Source, folder: Path, converter: Converter) -> Iterator[Path]:
    """A folder with what tells of a checkpoint on the Hub and the headers of its weights, without their numbers.

    Args:
        place: where it lies.
        folder: with its JSON files.
        converter: of its family.

    Yields:
        A folder that goes with the ``with`` statement; ``folder`` itself where all weights were fetched before.

    Raises:
        CheckpointError: if a file is missing, cannot be had, or is malformed.
    """
    fetch_below(place, folder, converter)
    files = sorted({name for names in file_names(folder, converter.weight_files).values() for name in names})
    if all((folder / name).is_file() for name in files):
        yield folder
        return
    with tempfile.TemporaryDirectory() as at:
        copy = Path(at) / place.name
        shutil.copytree(folder, copy, ignore=lambda below, names: [name for name in names if _is_weights(name)])
        for name in files:
            write_outline(copy / name, place.fetch_header(name, at=folder))
        yield copy


def _is_weights(name: str) -> bool:
    return name.endswith((".safetensors", ".bin", ".pt", ".pth"))


def load_converted(
    place: Source,
    folder: Path,
    converter: Converter,
    *,
    device: Any = None,
    device_map: Any = None,
    dtype: Any = "auto",
    attn_implementation: str | None = None,
    strict: bool = True,
    verify: bool = False,
    check_finite: str = "warn",
    check_size: bool = True,
    is_selected: bool = False,
    allow_pickle: bool = False,
) -> OmniMoeForCausalLM:
    """A published checkpoint as a model of ours.

    Args:
        place: where it lies.
        folder: with its JSON files.
        converter: of its family.
        device: as for ``from_pretrained``, and so what follows.
        device_map: only for checkpoints of ours.
        dtype: of the weights.
        attn_implementation: of the model.
        strict: refuse weights that do not fit.
        verify: compare with the hashes of a manifest.
        check_finite: what to do about weights that are no numbers.
        check_size: refuse a model larger than the memory that is free.
        is_selected: whether a part of the model is asked for, which only checkpoints of ours give.
        allow_pickle: whether pickles may be read, which only checkpoints of ours are from.

    Raises:
        CheckpointError: if the checkpoint is missing, malformed, unsafe, or does not fit.
        ValueError: for an argument that works on checkpoints of ours alone.
    """
    check_choice(check_finite)
    for name, is_given in (("device_map", device_map is not None), ("towers or without", is_selected)):
        if is_given:
            raise ValueError(
                f"{place.name!r} is a published {converter.name} checkpoint, which is converted as it is read, and "
                f"{name} works on converted ones: run `omnimoe convert {place.name} FOLDER` and load FOLDER"
            )
    if allow_pickle and has_pickles_alone(folder):
        raise CheckpointError(
            f"{place.name!r} is a published {converter.name} checkpoint whose weights are pickles, and "
            "allow_pickle=True reads those of omnimoe's own models alone; take a copy in safetensors, or save it as "
            "such with the library it was made for"
        )
    on_meta = torch.device(torch.get_default_device() if device is None else device).type == "meta"
    with contextlib.ExitStack() as opened:
        if on_meta and not verify and place.may_ask:
            folder = opened.enter_context(outlined(place, folder, converter))
        else:
            fetch_weights(place, folder, converter)
        if verify:
            weights = file_names(folder, converter.weight_files).values()
            verify_folder(folder, needed={*converter.json_files, *(name for names in weights for name in names)})
        held = opened.enter_context(Published(folder, converter, strict=strict, outline=on_meta))
        model = held.load(dtype=dtype, device=device, attn_implementation=attn_implementation, check_size=check_size)
    look_for_nan(model, check_finite, folder)
    return model

"""Safetensors files read and written tensor by tensor, so that no more than one published tensor is held at a time."""

from __future__ import annotations

import contextlib
import json
import re
import struct
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from math import prod
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_state_dict_into_shards_factory
from safetensors import SafetensorError, safe_open
from torch import Tensor

from omnimoe.checkpoint import CheckpointError, check_weights, read_json
from omnimoe.checkpoint.folder import check_shard, inside
from omnimoe.checkpoint.header import OUTLINE, Entry, read_header
from omnimoe.convert.rules import Shape

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""Types of safetensors that are converted. Eight-bit floats are not: they mean nothing without their scales."""
NAMES = {dtype: name for name, dtype in DTYPES.items()}


class Weights:
    """The tensors of a folder by name. Opening reads the headers, :meth:`read` the numbers that are asked for.

    Args:
        folder: of a checkpoint.
        files: for each prefix that names are given, the file, or the file whose index is there; it may lie in a folder
            below.
        outline: take files without numbers too, of which there is nothing to :meth:`read`.

    Raises:
        CheckpointError: if a file is missing or malformed, lies outside of the folder, or two files hold one name.
    """

    def __init__(self, folder: Path, files: Mapping[str, str] | None = None, *, outline: bool = False) -> None:
        self.shapes: dict[str, Shape] = {}
        self.dtypes: dict[str, torch.dtype] = {}
        self.is_outline = False
        self._places: dict[str, tuple[Path, str]] = {}
        self._opened: dict[Path, Any] = {}
        self._closing = contextlib.ExitStack()
        for prefix, file in (files or {"": "model.safetensors"}).items():
            index = _index_of(folder, file)
            if file == "model.safetensors":
                check_weights(folder, outline=outline)
            for name in file_names(folder, {prefix: file})[prefix]:
                keys = [key for key, shard in index.items() if shard == name]
                if not keys and not (folder / name).exists():
                    raise CheckpointError(f"{folder} has no {name}; fetch or copy it again")
                entries = check_shard(folder, name, keys, outline=outline)
                self._list(inside(folder, name), prefix, entries)

    def _list(self, path: Path, prefix: str, entries: Mapping[str, Entry]) -> None:
        self.is_outline |= path.stat().st_size < sum(entry.size for entry in entries.values())
        for stored, entry in entries.items():
            name = prefix + stored
            if name in self._places:
                raise CheckpointError(f"{path} holds {stored}, which another file of the folder holds too")
            if entry.dtype not in DTYPES:
                raise CheckpointError(
                    f"{path}: {stored} is {entry.dtype}, a quantised type, which is not converted; take a copy in "
                    "bfloat16"
                )
            self.shapes[name], self.dtypes[name] = entry.shape, DTYPES[entry.dtype]
            self._places[name] = path, stored

    def respell(self, spellings: Mapping[str, str]) -> None:
        """Gives tensors other names.

        Args:
            spellings: a pattern and what stands in its place, one after the other; a name that the files hold already
                is not given again.
        """
        tables: tuple[dict[str, Any], ...] = (self.shapes, self.dtypes, self._places)
        for pattern, instead in spellings.items():
            for known in list(self.shapes):
                name = re.sub(pattern, instead, known)
                if name not in self.shapes:
                    for table in tables:
                        table[name] = table.pop(known)

    def read(self, name: str, region: tuple[slice, ...] = ()) -> Tensor:
        """A tensor, or a slice of it.

        Raises:
            CheckpointError: if the file ends too early.
        """
        path, stored = self._places[name]
        try:
            if path not in self._opened:
                self._opened[path] = self._closing.enter_context(safe_open(path, framework="pt"))
            handle = self._opened[path]
            return handle.get_slice(stored)[region] if region else handle.get_tensor(stored)
        except (SafetensorError, OSError, RuntimeError) as error:
            raise CheckpointError(f"{name} cannot be read: {error}") from error

    def close(self) -> None:
        """Closes the files."""
        self._closing.close()

    def __enter__(self) -> Weights:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


class Held:
    """The tensors of a model under the interface of :class:`Weights`."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self.tensors = tensors
        self.shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        self.dtypes = {name: tensor.dtype for name, tensor in tensors.items()}
        self.is_outline = any(tensor.is_meta for tensor in tensors.values())

    def read(self, name: str, region: tuple[slice, ...] = ()) -> Tensor:
        """A tensor, or a slice of it."""
        return self.tensors[name].detach()[region] if region else self.tensors[name].detach()


def main_dtype(dtypes: Mapping[str, torch.dtype], shapes: Mapping[str, Shape]) -> torch.dtype:
    """The floating type that most numbers have."""
    counts: Counter[torch.dtype] = Counter()
    for name, dtype in dtypes.items():
        if dtype.is_floating_point:
            counts[dtype] += prod(shapes[name])
    return counts.most_common(1)[0][0] if counts else torch.get_default_dtype()


def file_names(folder: Path, files: Mapping[str, str]) -> dict[str, list[str]]:
    """The files of each prefix: one, or the shards that an index names.

    Args:
        folder: with at least the indexes in it.
        files: as for :class:`Weights`.

    Raises:
        CheckpointError: if an index is malformed.
    """
    return {prefix: sorted(set(_index_of(folder, file).values())) or [file] for prefix, file in files.items()}


def _index_of(folder: Path, file: str) -> dict[str, str]:
    """The shard of each tensor, as it is reached from the folder; empty without an index."""
    path = folder / f"{file}.index.json"
    if not path.exists():
        return {}
    shards = read_json(inside(folder, f"{file}.index.json"), CheckpointError).get("weight_map")
    if not isinstance(shards, dict) or not shards:
        raise CheckpointError(f"{path} has no weight_map from keys to file names; fetch the model again")
    for shard in shards.values():
        if not isinstance(shard, str) or not re.fullmatch(r"[\w\-][\w.\-]*\.safetensors", shard, re.ASCII):
            raise CheckpointError(f"{path} names {shard!r}; a shard is a .safetensors file in the same folder")
    at = file[: file.rfind("/") + 1]
    return {name: at + shard for name, shard in shards.items()}


def stored_names(folder: Path, file: str = "model.safetensors") -> list[str]:
    """Names of the tensors that lie in a file or in the shards of its index; none where there is neither.

    Raises:
        CheckpointError: if index or file are malformed.
    """
    index = _index_of(folder, file)
    if index or not (folder / file).exists():
        return sorted(index)
    return sorted(read_header(inside(folder, file), outline=True))


def write_weights(
    folder: Path,
    tensors: Mapping[str, tuple[torch.dtype, Shape]],
    read: Callable[[str], Iterable[Tensor]],
    *,
    file: str = "model.safetensors",
    max_shard_size: int | str = "5GB",
    outline: bool = False,
) -> None:
    """Writes tensors into one file, or into several and an index.

    Args:
        folder: where to.
        tensors: type and shape of each.
        read: gives the parts of a tensor one by one, in the order of its memory.
        file: name of the file, which may lie in a folder below.
        max_shard_size: bytes of a file, or words such as ``"5GB"``.
        outline: write the headers alone, and read nothing.
    """
    stem, _, suffix = file.rpartition(".")
    split = split_state_dict_into_shards_factory(
        dict(tensors),
        get_storage_size=lambda held: held[0].itemsize * prod(held[1]),
        filename_pattern=f"{stem}{{suffix}}.{suffix}",
        max_shard_size=max_shard_size,
    )
    (folder / file).parent.mkdir(parents=True, exist_ok=True)
    for name, held in split.filename_to_tensors.items():
        _write_file(folder / name, {key: tensors[key] for key in held}, None if outline else read)
    if split.is_sharded:
        shards = {name: shard.rpartition("/")[2] for name, shard in split.tensor_to_filename.items()}
        index = {"metadata": split.metadata, "weight_map": shards}
        (folder / f"{file}.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _write_file(
    path: Path, tensors: Mapping[str, tuple[torch.dtype, Shape]], read: Callable[[str], Iterable[Tensor]] | None
) -> None:
    header: dict[str, Any] = {"__metadata__": {"format": "pt", **({} if read else OUTLINE)}}
    end = 0
    # wide types first, so that every tensor starts at a multiple of its width
    order = sorted(tensors, key=lambda name: (-tensors[name][0].itemsize, name))
    for name in order:
        dtype, shape = tensors[name]
        start, end = end, end + dtype.itemsize * prod(shape)
        header[name] = {"dtype": NAMES[dtype], "shape": list(shape), "data_offsets": [start, end]}
    told = _told(header)
    with path.open("wb") as out:
        out.write(told)
        if read is None:
            return
        for name in order:
            for part in read(name):
                data = part.to("cpu", tensors[name][0]).contiguous()
                out.write(data.reshape(-1).view(torch.uint8).numpy().data)
            written, wanted = out.tell() - len(told), header[name]["data_offsets"][1]
            if written != wanted:
                raise ValueError(f"{name} was to end at byte {wanted} of {path.name}, but its parts end at {written}")


def write_outline(path: Path, header: Mapping[str, Any]) -> None:
    """Writes a file that is a header alone.

    Args:
        path: of the file; its folder is made.
        header: of a safetensors file.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    notes = {**(header.get("__metadata__") or {}), **OUTLINE}
    path.write_bytes(_told({**header, "__metadata__": notes}))


def _told(header: Mapping[str, Any]) -> bytes:
    """The start of a safetensors file, as far as its tensors."""
    told = json.dumps(header, separators=(",", ":")).encode()
    told += b" " * (-len(told) % 8)
    return struct.pack("<Q", len(told)) + told

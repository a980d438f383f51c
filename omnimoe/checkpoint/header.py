"""The header of a safetensors file, held to more than the library asks.

The library takes spaces before the header, a key that stands twice, names that are empty or look like paths, and files
without tensors. None of them comes from a save, and each is read differently by somebody.

Source: the format, https://github.com/huggingface/safetensors#format.
"""

from __future__ import annotations

import math
import reprlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from omnimoe.checkpoint.errors import CheckpointError, parse_json
from omnimoe.checkpoint.sniff import suspicion

OUTLINE = {"omnimoe": "outline"}
"""Metadata of a file that is a header alone: names, shapes and types of tensors without their numbers."""
HEADER_LIMIT = 32 << 20
"""Bytes of the largest header that is read, for 300,000 weights; the library reads 100 MB."""
BITS = {
    **dict.fromkeys(("F64", "I64", "U64", "C64"), 64),
    **dict.fromkeys(("F32", "I32", "U32"), 32),
    **dict.fromkeys(("F16", "BF16", "I16", "U16"), 16),
    **dict.fromkeys(("BOOL", "I8", "U8", "F8_E4M3", "F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    "F4": 4,
}
"""Bits of a value by the name of its dtype; those that PyTorch reads."""
_NAME_LIMIT = 512
_BRIEF = reprlib.Repr()
"""A value in a message may be as long as the header."""
_BRIEF.maxlist, _BRIEF.maxdict, _BRIEF.maxstring, _BRIEF.maxother = 40, 8, 80, 80
_FIELDS = {"dtype", "shape", "data_offsets"}


@dataclass(frozen=True)
class Entry:
    """A tensor as its header declares it.

    Args:
        dtype: its name in the file, a key of :data:`BITS`.
        shape: of the tensor.
        size: bytes.
    """

    dtype: str
    shape: tuple[int, ...]
    size: int


def read_header(path: Path, *, outline: bool = False) -> dict[str, Entry]:
    """The tensors of a safetensors file by name, read from its header alone.

    Args:
        path: of the file.
        outline: take one without numbers too, written from a model on the meta device.

    Raises:
        CheckpointError: if it is no such file, or one that no save writes.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            start = file.read(512)
            length = int.from_bytes(start[:8], "little")
            if size < 8:
                _refuse(path, f"has {size} bytes, and a safetensors file at least 8", start)
            if length > min(HEADER_LIMIT, size - 8):
                limit = "the file itself" if length > size - 8 else f"{HEADER_LIMIT:,} bytes"
                _refuse(path, f"would have a header of {length:,} bytes, more than {limit}", start)
            file.seek(8)
            header = file.read(length)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    if header[:1] != b"{":
        _refuse(path, f"has a header that starts with {header[:8]!r}, not with '{{'", start)
    try:
        text = header.decode("utf-8")
        if not text.rstrip(" ").endswith("}"):
            raise ValueError("after the last '}' only spaces may stand")
        plain = parse_json(text, constants=False)
    except (ValueError, RecursionError) as error:
        _refuse(path, f"has a header that is no JSON of this format: {error}")
    return _tensors(path, plain, size - 8 - length, outline)


def _tensors(path: Path, plain: dict[str, Any], available: int, outline: bool) -> dict[str, Entry]:
    notes = plain.pop("__metadata__", {})
    if not isinstance(notes, dict) or not all(isinstance(note, str) for note in notes.values()):
        _refuse(path, f"has metadata that are no texts by name: {_short(notes)}")
    if not plain:
        _refuse(path, "holds no tensors")
    found, spans = {}, []
    for name, entry in plain.items():
        _check_name(path, name)
        if not isinstance(entry, dict) or set(entry) != _FIELDS:
            _refuse(path, f"describes {name!r} by {_short(entry)}, not by exactly {', '.join(sorted(_FIELDS))}")
        dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
        if not isinstance(dtype, str) or dtype not in BITS:
            _refuse(path, f"gives {name!r} the dtype {_short(dtype)}, which is not one of {', '.join(sorted(BITS))}")
        if not _are_counts(shape) or len(shape) > 16:
            _refuse(path, f"gives {name!r} the shape {_short(shape)}")
        if not _are_counts(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
            _refuse(path, f"gives {name!r} the offsets {_short(offsets)}, not a begin and an end")
        begin, end = offsets
        bits = math.prod(shape) * BITS[dtype]
        if bits != 8 * (end - begin):
            wants = f"{dtype} of shape {_short(shape)} takes {_short(bits)} bits"
            _refuse(path, f"gives {name!r} {end - begin} bytes, but {wants}")
        spans.append((begin, end, name))
        found[name] = Entry(dtype, tuple(shape), end - begin)
    place = 0
    for begin, end, name in sorted(spans):
        if begin != place:
            how = "a hole before" if begin > place else "an overlap at"
            _refuse(path, f"has {how} {name!r}, which begins at byte {begin} and not at {place}")
        place = end
    if not available and OUTLINE.items() <= notes.items():
        if outline:
            return found
        raise CheckpointError(
            f"{path} is an outline, the names, shapes and types of {len(found):,} tensors without their numbers; load "
            "it with device='meta'"
        )
    if place > available:
        raise CheckpointError(
            f"{path} is cut off: {place:,} bytes of tensors belong there, and {available:,} are there"
        )
    if place < available:
        _refuse(path, f"has {available - place:,} bytes after its last tensor")
    return found


def _check_name(path: Path, name: str) -> None:
    if not name:
        _refuse(path, "has a tensor without a name")
    if len(name) > _NAME_LIMIT or not name.isprintable() or "/" in name or "\\" in name or name.startswith("."):
        _refuse(path, f"has a tensor named {_short(name)}, which is no name of a weight")


def _are_counts(values: object) -> bool:
    return isinstance(values, list) and all(type(value) is int and 0 <= value < 1 << 63 for value in values)


def _short(value: object) -> str:
    text = _BRIEF.repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _refuse(path: Path, reason: str, start: bytes = b"") -> NoReturn:
    seems = suspicion(start)
    raise CheckpointError(
        f"{path} {reason}; it seems to be {seems}"
        if seems
        else f"{path} {reason}; it cannot be read as safetensors, so fetch or save it again"
    )

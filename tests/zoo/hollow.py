"""Published folders at full size without their numbers: what strict loading and saving can be held to anywhere."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator, Mapping
from math import prod
from pathlib import Path

import pytest

from omnimoe import CheckpointError, OmniMoeForCausalLM, convert_checkpoint, from_pretrained
from omnimoe.convert import CONVERTERS
from omnimoe.model import MODELS

Keys = dict[str, tuple[int, ...]]


def write_hollow(folder: Path, name: str, keys: Mapping[str, tuple[int, ...]]) -> Path:
    """A folder of a model of the zoo as it is published, each file with a hole where its numbers would be."""
    known = MODELS.get(name)().published
    folder.mkdir(exist_ok=True)
    for prefix, file in _files(name).items():
        header: dict[str, dict] = {"__metadata__": {"format": "pt"}}
        end = 0
        for key in _of(prefix, name, keys):
            start, end = end, end + 2 * prod(keys[key])
            header[key.removeprefix(prefix)] = {
                "dtype": "BF16",
                "shape": list(keys[key]),
                "data_offsets": [start, end],
            }
        told = json.dumps(header).encode()
        told += b" " * (-len(told) % 8)
        (folder / file).parent.mkdir(exist_ok=True)
        with (folder / file).open("wb") as out:
            out.write(struct.pack("<Q", len(told)) + told)
            out.truncate(8 + len(told) + end)
    for file, plain in known["files"].items():
        (folder / file).parent.mkdir(exist_ok=True)
        (folder / file).write_text(json.dumps(plain), encoding="utf-8")
    return folder


def listed(folder: Path, name: str) -> Keys:
    """Name and shape of every tensor that the headers of a folder's files tell."""
    found: Keys = {}
    for prefix, file in _files(name).items():
        for path in (folder / file).parent.glob(f"{Path(file).stem}*.safetensors"):
            with path.open("rb") as held:
                header = json.loads(held.read(struct.unpack("<Q", held.read(8))[0]))
            found |= {prefix + key: tuple(entry["shape"]) for key, entry in header.items() if key != "__metadata__"}
    return found


def loads_and_saves(name: str, keys: Keys, folder: Path) -> OmniMoeForCausalLM:
    """Holds a model of the zoo to the published list: it loads strictly, and is saved under the same names and shapes.

    Returns:
        What was loaded, on the meta device.
    """
    model = from_pretrained(write_hollow(folder / "published", name, keys), device="meta")
    assert all(held.is_meta for held in model.state_dict().values())
    with pytest.raises(CheckpointError, match="on the meta device and has no numbers to write"):
        convert_checkpoint(model, folder / "saved", to="published")
    assert not (folder / "saved").exists()
    written = convert_checkpoint(model, folder / "saved", to="published", outline=True)
    assert written.num_tensors == len(keys)
    assert listed(folder / "saved", name) == keys
    if CONVERTERS.get(model.config.published["family"]).in_one_file:
        assert all((folder / "saved" / file).is_file() for file in _files(name).values())
    again = from_pretrained(folder / "saved", device="meta")
    assert [(key, held.shape) for key, held in again.state_dict().items()] == [
        (key, held.shape) for key, held in model.state_dict().items()
    ]
    with pytest.raises(CheckpointError, match="is an outline.*load it with device='meta'"):
        from_pretrained(folder / "saved")
    return model


def refuses(name: str, keys: Keys, folder: Path, changed: str, other: str) -> None:
    """Holds a model of the zoo to naming keys that are missing, extra, renamed or of another shape, with their cause.

    Args:
        name: of the model.
        keys: the published list.
        folder: to write into.
        changed: the key that is left out, renamed or of another shape.
        other: a name that the published list does not have.
    """
    rest = {key: shape for key, shape in keys.items() if key != changed}
    for kind, held, told in (
        ("missing", rest, rf"(?s)1 missing:\n  {changed}\n.*Likely cause: a file of the checkpoint is missing"),
        ("extra", {**keys, other: (3,)}, rf"(?s)1 unexpected:\n  {other}\n.*Likely cause: the config is of a smaller"),
        ("renamed", {**rest, other: keys[changed]}, rf"(?s)Likely cause: renamed: {other} for {changed}"),
        ("misshapen", {**keys, changed: (5, 7)}, rf"(?s)1 misshapen:\n  {changed}.*\(5, 7\) in the file"),
    ):
        with pytest.raises(CheckpointError, match=told):
            from_pretrained(write_hollow(folder / kind, name, held), device="meta")


def _files(name: str) -> Mapping[str, str]:
    return CONVERTERS.get(MODELS.get(name)().published["family"]).weight_files


def _of(prefix: str, name: str, keys: Mapping[str, tuple[int, ...]]) -> Iterator[str]:
    """The keys that lie in the file of a prefix."""
    longer = [known for known in _files(name) if len(known) > len(prefix)]
    return (key for key in keys if key.startswith(prefix) and not any(key.startswith(known) for known in longer))

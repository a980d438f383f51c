"""PyTorch's own pickles, for who allows them: read by its restricted unpickler, and held to what safetensors are."""

from __future__ import annotations

import pickle
import re
from pathlib import Path

import torch
from torch import Tensor

from omnimoe.checkpoint.errors import CheckpointError
from omnimoe.checkpoint.folder import inside, parts_of, weight_map
from omnimoe.checkpoint.header import Entry

FILE = "pytorch_model.bin"
INDEX = f"{FILE}.index.json"
_FLOATS = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
}


def has_pickles_alone(folder: Path) -> bool:
    """Whether transformers would find its own pickle in the folder, and no safetensors."""
    names = {path.name for path in folder.iterdir()}
    return bool(names & {FILE, INDEX}) and not any(
        name.endswith((".safetensors", ".safetensors.index.json")) for name in names
    )


def check_pickles(folder: Path) -> dict[str, Entry]:
    """Refuses transformers' own pickles that are missing or malformed, name code, or lead out of the folder.

    Returns:
        The weights by name. Their numbers take no memory.
    """
    if not (folder / INDEX).exists():
        return _read(folder, FILE)
    if (folder / FILE).exists():
        raise CheckpointError(
            f"{folder} holds both {FILE} and {INDEX}, of which one is left from an earlier save; remove the older"
        )
    shards = weight_map(folder / INDEX, "bin")
    found: dict[str, Entry] = {}
    for shard in sorted(set(shards.values())):
        held = _read(folder, shard)
        absent = sorted({key for key, file in shards.items() if file == shard} - set(held))
        if absent:
            raise CheckpointError(f"{folder / shard} has no {absent[0]}, where the index looks for {parts_of(absent)}")
        found |= held
    return found


def _read(folder: Path, name: str) -> dict[str, Entry]:
    path = folder / name
    if not path.exists():
        raise CheckpointError(f"{path} is missing; fetch or copy it again")
    try:
        held = torch.load(inside(folder, name), map_location="meta", weights_only=True)
    except CheckpointError:
        raise
    except pickle.UnpicklingError as error:
        code = re.search(r"GLOBAL ([\w.]+)", str(error))
        why = f"it names {code[1]}, which is no part of weights and can run code" if code else "it is malformed"
        raise CheckpointError(f"{path} is not opened: {why}; get the weights as safetensors") from error
    except Exception as error:  # whatever bytes that are no pickle make the unpickler raise
        raise CheckpointError(f"{path} cannot be read as a pickle of weights: {error!r}; fetch it again") from error
    if not isinstance(held, dict) or not all(isinstance(tensor, Tensor) for tensor in held.values()):
        raise CheckpointError(f"{path} holds something else than weights by name; save the model again")
    return {
        str(key): Entry(
            _FLOATS.get(tensor.dtype, str(tensor.dtype).removeprefix("torch.")),
            tuple(tensor.shape),
            tensor.numel() * tensor.element_size(),
        )
        for key, tensor in held.items()
    }

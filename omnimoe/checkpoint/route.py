"""From the arguments of transformers' ``from_pretrained`` to the folder that is read."""

from __future__ import annotations

from collections.abc import Mapping
from os import PathLike, fspath
from pathlib import Path
from typing import Any

from omnimoe.checkpoint.errors import CheckpointError, read_json
from omnimoe.checkpoint.fetch import Hub, Source, weight_files
from omnimoe.checkpoint.fit import FLOATS
from omnimoe.checkpoint.folder import end_broken_save, inside, read_index
from omnimoe.checkpoint.header import read_header
from omnimoe.checkpoint.pickles import has_pickles_alone

ADAPTERS = "adapter_model.safetensors"
CONFIG_OF_ADAPTERS = "adapter_config.json"
_OF_THE_HUB = ("cache_dir", "token", "local_files_only")
_PLACE = (*_OF_THE_HUB, "subfolder", "revision", "force_download", "proxies")


def find_folder(source: str | PathLike[str], given: Mapping[str, Any]) -> tuple[Path, dict[str, Any]]:
    """The folder of a model, fetched where it is not there; of adapters that of their base.

    Args:
        source: a folder, or an id on the Hub.
        given: the arguments of loading.

    Returns:
        The folder, and the arguments without those that say where it is, with adapters among them.

    Raises:
        CheckpointError: if there is no such folder, or it holds adapters that are malformed or a pickle.
    """
    folder = _fetched(source, given)
    rest = {name: value for name, value in given.items() if name not in _PLACE}
    adapters = dict(rest.get("adapter_kwargs") or {})
    if (folder / CONFIG_OF_ADAPTERS).is_file() and not (folder / "config.json").is_file():
        plain = read_json(inside(folder, CONFIG_OF_ADAPTERS), CheckpointError)
        base, revision = plain.get("base_model_name_or_path"), plain.get("revision")
        if not isinstance(base, str) or not base:
            raise CheckpointError(f"{folder / CONFIG_OF_ADAPTERS} names no base model; load that, then load_adapter")
        adapters["_adapter_model_path"] = fspath(folder)
        rest["adapter_kwargs"] = adapters
        asked = {name: given[name] for name in _OF_THE_HUB if name in given}
        # what PEFT wrote down is the revision of the base, which a folder has none of
        folder = _fetched(base, asked if Path(base).is_dir() else {**asked, "revision": revision})
    place = folder_of_adapters(folder, rest)
    if place is not None:
        check_adapters(place)
    return folder, rest


def check_adapters(folder: Path) -> None:
    """Refuses adapters whose weights are missing, malformed, or no fractions.

    Raises:
        CheckpointError: with the file and what is wrong with it.
    """
    if not (folder / ADAPTERS).exists():
        raise CheckpointError(f"{folder} has adapters and no {ADAPTERS}; save them again")
    read_json(inside(folder, CONFIG_OF_ADAPTERS), CheckpointError)
    for name, entry in read_header(inside(folder, ADAPTERS)).items():
        if entry.dtype not in FLOATS:
            raise CheckpointError(
                f"{folder / ADAPTERS} holds {name} as {entry.dtype}, and adapters are of floating point; save it again"
            )


def folder_of_adapters(folder: Path, given: Mapping[str, Any]) -> Path | None:
    """Where the adapters lie that are loaded with a model: in its folder or one of their own; None without any.

    Args:
        folder: of the model.
        given: the arguments of loading, as :func:`find_folder` returns them.
    """
    place = Path((given.get("adapter_kwargs") or {}).get("_adapter_model_path") or folder)
    return place if (place / CONFIG_OF_ADAPTERS).is_file() else None


def is_pickle(folder: Path, allow_pickle: bool, given: Mapping[str, Any]) -> bool:
    """Whether the weights are read from a pickle, which only who allows it gets.

    Args:
        folder: of the model.
        allow_pickle: whether that is allowed.
        given: the arguments of loading.

    Raises:
        CheckpointError: if one is asked for and not allowed.
    """
    if given.get("gguf_file"):
        raise CheckpointError("weights are read from safetensors only; convert the GGUF file first")
    if given.get("use_safetensors") is False and not allow_pickle:
        raise CheckpointError("use_safetensors=False asks for a pickle, which can run code; pass allow_pickle=True too")
    return allow_pickle and (given.get("use_safetensors") is False or has_pickles_alone(folder))


def _fetched(source: str | PathLike[str], given: Mapping[str, Any]) -> Path:
    subfolder = given.get("subfolder") or ""
    if Path(source).is_dir():
        folder = Path(source) / subfolder
        end_broken_save(folder)
        return folder
    asked = {name: given[name] for name in ("revision", "cache_dir", "token") if given.get(name) is not None}
    asked |= {name: bool(given.get(name)) for name in ("local_files_only", "force_download")}
    hub = Hub(**asked)
    place = Source.find(source, subfolder=subfolder, hub=hub)
    folder = place.fetch()
    if (folder / CONFIG_OF_ADAPTERS).is_file() and not (folder / "config.json").is_file():
        return place.fetch([ADAPTERS], at=folder)
    return place.fetch(weight_files(read_index(folder, variant=given.get("variant"))), at=folder)

"""Adapters of PEFT on their way into a model: fetched where they are on the Hub, checked, and compared with the model.

transformers would load adapters of another model, or half of them, with a line in the log: the model then answers as if
it had none.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from os import PathLike, fspath
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from omnimoe.checkpoint import CheckpointError, Hub, Source
from omnimoe.checkpoint.errors import MisfitError
from omnimoe.checkpoint.folder import inside
from omnimoe.checkpoint.header import read_header
from omnimoe.checkpoint.report import complaint
from omnimoe.checkpoint.route import ADAPTERS, CONFIG_OF_ADAPTERS, check_adapters

_OF_THE_HUB = ("revision", "cache_dir", "token", "local_files_only", "force_download")
_PREFIX = "base_model.model."
"""What PEFT puts before the names of a model's parts."""


def find_adapters(source: str | PathLike[str], given: Mapping[str, Any]) -> tuple[Path, dict[str, Any]]:
    """The folder of adapters, fetched where it is not there, with its files checked.

    Args:
        source: a folder or an id on the Hub.
        given: the arguments of ``load_adapter`` by name.

    Returns:
        The folder, and ``adapter_kwargs`` without what says where it is.

    Raises:
        CheckpointError: if there are no such adapters, or they are malformed or a pickle.
    """
    more = given.get("kwargs") or {}
    place = {
        **(getattr(given.get("load_config"), "download_kwargs", None) or {}),
        **(more.get("download_kwargs") or {}),
    }
    place |= {"local_files_only": True} if given.get("local_files_only") else {}
    place |= given.get("adapter_kwargs") or {}
    asked = {name: place[name] for name in _OF_THE_HUB if place.get(name) is not None}
    if Path(source).is_dir():
        asked.pop("revision", None)
    found = Source.find(source, subfolder=place.get("subfolder"), hub=Hub(**asked))
    folder = found.fetch()
    if not (folder / CONFIG_OF_ADAPTERS).is_file():
        raise CheckpointError(f"{found.name!r} holds no adapters: it has no {CONFIG_OF_ADAPTERS}; load models by name")
    if not found.is_folder:
        folder = found.fetch([ADAPTERS], at=folder)
    check_adapters(folder)
    rest = {name: value for name, value in place.items() if name not in (*_OF_THE_HUB, "subfolder", "proxies")}
    return folder, rest


def check_fit(model: PreTrainedModel, folder: Path) -> None:
    """Refuses adapters whose weights are not those that the model takes by their config.

    Args:
        model: that they are for; it is not changed.
        folder: of the adapters.

    Raises:
        CheckpointError: if the banks that they are for are quantised.
        ImportError: if PEFT is not installed.
        MisfitError: with what is missing, unexpected or misshapen.
    """
    try:
        from peft import PeftConfig, get_peft_model_state_dict, inject_adapter_in_model
    except ImportError as error:
        raise ImportError("adapters need PEFT: pip install 'omnimoe[peft]'") from error
    config = PeftConfig.from_pretrained(fspath(folder))
    parts = {type(weight).__module__.partition(".")[0] for weight in model.parameters()}
    if getattr(config, "target_parameters", None) and "torchao" in parts:
        raise CheckpointError(
            f"the adapters in {folder} are added to the numbers of banks, and the model's are quantised; load it "
            "without quantisation, merge them, and quantise then"
        )
    if hasattr(config, "init_lora_weights"):
        config.init_lora_weights = False
    with torch.device("meta"):
        twin = type(model)(copy.deepcopy(model.config))
        own = {name: tuple(held.shape) for name, held in twin.state_dict().items()}
        inject_adapter_in_model(config, twin)
        own |= {name: tuple(held.shape) for name, held in twin.state_dict().items()}
        states = get_peft_model_state_dict(twin, save_embedding_layers=False)
    wanted = {name.removeprefix(_PREFIX): tuple(held.shape) for name, held in states.items()}
    entries = read_header(inside(folder, ADAPTERS))
    shapes = {name.removeprefix(_PREFIX): entry.shape for name, entry in entries.items()}
    # embeddings and heads that were adapted or trained along lie beside the adapters
    known = {**own, **wanted}
    misfit = complaint(
        {
            "missing_keys": set(wanted) - set(shapes),
            "unexpected_keys": set(shapes) - set(known),
            "mismatched_keys": [
                (name, held, known[name]) for name, held in shapes.items() if name in known and held != known[name]
            ],
        }
    )
    if misfit:
        base = model.name_or_path or type(model).__name__
        raise MisfitError(
            f"the adapters in {folder} do not fit the model {base!r}.\n{misfit}\nthey are of another model or of a "
            "part of one (towers=, without=): load that, then call its load_adapter"
        )

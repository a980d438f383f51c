"""Tier 8: models by name and models from files, on the disk or on the Hub.

Building a registered model never touches the network; which there are is told by ``catalogue``.
"""

from __future__ import annotations

import contextlib
import inspect
import logging
import os
from collections.abc import Callable, Iterable, Iterator
from os import PathLike, fspath
from pathlib import Path
from typing import Any

import torch

from omnimoe.bars import bars_where_seen
from omnimoe.catalogue import ModelInfo, add_model_config, card_of, list_models, load_zoo, model_info, weights_of
from omnimoe.checkpoint import (
    CheckpointError,
    Hub,
    Source,
    check_weights,
    complaint,
    read_index,
    read_json,
    weight_files,
)
from omnimoe.checkpoint.errors import MisfitError
from omnimoe.checkpoint.fetch import PREFIXES, check_name
from omnimoe.checkpoint.folder import check_config
from omnimoe.checkpoint.header import Entry
from omnimoe.checkpoint.route import ADAPTERS, CONFIG_OF_ADAPTERS
from omnimoe.classifier import class_of
from omnimoe.closest import closest_models
from omnimoe.config import ConfigError
from omnimoe.convert import CONVERTERS, find_converter
from omnimoe.convert.licence import tell
from omnimoe.convert.load import fetch_below, load_converted
from omnimoe.model import MODELS, OmniMoeConfig
from omnimoe.pretrained import OmniMoePreTrainedModel
from omnimoe.registry import RegistryError
from omnimoe.towers import load_pieces, pieces, select

logger = logging.getLogger(__name__)

_SPREADS = ("auto", "balanced", "balanced_low_0", "sequential")
"""Of ``device_map``: what is no device."""

_WHOLE_ALONE = {
    "quantization_config": "load this one without and call omnimoe.quantize(model)",
    "distributed_config": "load this one on one process, save it and load that",
    "num_labels": "load this one without, save it and load that",
}
"""Arguments that neither parts nor published models of other libraries take, and what to do."""

__all__ = [
    "MODELS",
    "ModelInfo",
    "add_model_config",
    "from_pretrained",
    "list_models",
    "load",
    "load_zoo",
    "model_info",
]


def load(
    name: str | PathLike[str],
    *,
    pretrained: bool = False,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    seed: int | None = None,
    attn_implementation: str | None = None,
    num_labels: int | None = None,
    **overrides: Any,
) -> Any:
    """A model by name, with fresh weights or with those that were published for it.

    Args:
        name: of :func:`list_models`; or where a model lies, as for :func:`from_pretrained`: its weights with
            ``pretrained``, otherwise fresh ones under its config.
        pretrained: load weights.
        device: where to build; ``"meta"`` takes no memory.
        dtype: of the weights; float32 where None, with ``pretrained`` that of the file.
        seed: of fresh weights; the global generator is left as it was. None draws from the global generator.
        attn_implementation: ``"sdpa"``, ``"eager"``, ``"flex_attention"`` or another that transformers knows.
        num_labels: put a head over so many labels in the place of that over the vocabulary.
        overrides: fields of the config to change, ``num_layers=2``; with ``pretrained`` instead arguments of
            :func:`from_pretrained`. Of an address, ``revision``, ``token`` and the like are taken without it too.

    Returns:
        The model, in training mode if fresh and in evaluation mode if pretrained: an :class:`OmniMoeForCausalLM`, with
        ``num_labels`` an :class:`OmniMoeForSequenceClassification`.

    Raises:
        RegistryError: if the name is unknown; the message names the nearest.
        ConfigError: if an override is no field of the config, or does not fit the others.
        ValueError: if weights are asked for and there are none.
    """
    check_name(name)
    name = f"local-dir:{fspath(name)}" if isinstance(name, PathLike) else name
    is_address = name not in MODELS and ("/" in name or name.startswith(PREFIXES) or Path(name).is_dir())
    if pretrained:
        source = name if is_address else weights_of(name)
        if source is None:
            card = card_of(name)
            if card is not None and name in card.unread:
                raise ValueError(f"no weights of {name!r} are fetched: {card.unread[name]}")
            has = ", ".join(list_models(pretrained=True)) or "no registered model yet"
            raise ValueError(f"there are no weights for {name!r}; weights exist for: {has}. Leave pretrained=True out")
        changes = [field for field in overrides if field not in _arguments(from_pretrained)]
        if changes or seed is not None:
            given = ", ".join([*changes, *(["seed"] if seed is not None else [])])
            raise ValueError(f"published weights fit their own config, so {given} cannot be set with pretrained=True")
        overrides |= {"device": device, "dtype": dtype or "auto", "attn_implementation": attn_implementation}
        found = from_pretrained(source, num_labels=num_labels, **overrides)
        if not is_address:
            _describe(found[0] if isinstance(found, tuple) else found, name)
        return found
    if is_address:
        asked = {field: overrides.pop(field) for field in [*overrides] if field in _arguments(_config_at)}
        config = _config_at(name, **asked).replace(**overrides)
    else:
        config = MODELS.get(name)().replace(**overrides)
    if attn_implementation is not None:
        config._attn_implementation = attn_implementation
    place = torch.device(device) if device is not None else torch.get_default_device()
    kind = class_of(None, num_labels)
    if num_labels is not None:
        config.num_labels = num_labels
    with _seeded(seed, place), place:
        return kind._from_config(config, dtype=_dtype(dtype))


def from_pretrained(
    source: str | PathLike[str],
    *,
    revision: str | None = None,
    subfolder: str = "",
    towers: str | Iterable[str] | None = None,
    without: str | Iterable[str] = (),
    dtype: str | torch.dtype = "auto",
    device: str | torch.device | None = None,
    device_map: Any = None,
    strict: bool = True,
    local_files_only: bool = False,
    cache_dir: str | Path | None = None,
    token: str | bool | None = None,
    attn_implementation: str | None = None,
    verify: bool = False,
    check_finite: str = "warn",
    check_size: bool = True,
    allow_pickle: bool = False,
    quantization_config: Any = None,
    allow_partial: bool = False,
    num_labels: int | None = None,
    ignore_mismatched_sizes: bool = False,
    distributed_config: Any = None,
    output_loading_info: bool = False,
    trust_remote_code: bool = False,
) -> Any:
    """A model from a folder or from the Hub.

    Args:
        source: an existing folder, ``local-dir:folder``, an id ``org/name`` or ``hf-hub:org/name``; of a model of ours
            or of a family that is converted, such as Llama or Mixtral.
        revision: branch, tag or commit, on the Hub.
        subfolder: where in the folder or the repository the model lies.
        towers: names of the keys whose towers are loaded: the modalities, unless the config has other keys. What they
            do not need is neither fetched nor read, and the model is as much smaller.
        without: names of modalities or keys that are left out likewise.
        dtype: of the weights; ``"auto"`` takes that of the file.
        device: where to put the model; ``"meta"`` takes no memory, and of published weights on the Hub their headers.
        device_map: transformers' spreading over devices, in place of ``device``.
        strict: refuse a checkpoint with a missing, an unexpected or a misshapen key; otherwise log them.
        local_files_only: look on the Hub's local cache alone.
        cache_dir: of downloads; huggingface_hub's own where None.
        token: for what is private or gated; that of ``hf auth login`` where None, none at all where False.
        attn_implementation: as for :func:`load`.
        verify: compare every file that is read with the hash in the folder's manifest.
        check_finite: ``"warn"``, ``"error"`` or ``"off"`` for weights that are NaN or infinite.
        check_size: refuse a model larger than the memory that is free.
        allow_pickle: read pytorch_model.bin where there is no other file, without running code of it; of checkpoints of
            omnimoe alone.
        quantization_config: of transformers, or ``"int8"``: torchao's int8 weights for every bank.
        allow_partial: let a quantisation leave some of the layers' weights as they are.
        num_labels: put a head over so many labels in the place of that over the vocabulary. A file without such a head
            gives a fresh one; one of another size is refused.
        ignore_mismatched_sizes: as ``strict=False``, by transformers' name.
        distributed_config: transformers' ``DistributedConfig``, for one process of several.
        output_loading_info: return transformers' report too.
        trust_remote_code: taken, since it is passed to models of any kind; no code of a checkpoint is ever run.

    Returns:
        The model, in evaluation mode: an :class:`OmniMoeForCausalLM`, or an :class:`OmniMoeForSequenceClassification`
        where ``num_labels`` is given or the folder holds one. With ``output_loading_info`` the model and a mapping with
        ``missing_keys``, ``unexpected_keys`` and ``mismatched_keys``.

    Raises:
        CheckpointError: if the checkpoint is missing, malformed, unsafe, or does not fit.
        QuantizationError: if weights of the layers would stay as they are.
        ValueError: if arguments do not go together.
        ConfigError: if ``towers`` or ``without`` name what the model does not have, or leave nothing.
    """
    if device is not None and device_map is not None:
        raise ValueError("device and device_map say the same thing twice; pass one of them")
    if distributed_config is not None:
        if device is not None or device_map is not None:
            raise ValueError("distributed_config says where the weights go; leave device and device_map out")
        if "RANK" not in os.environ and not torch.distributed.is_initialized():
            raise ValueError("distributed_config is for one process of several; start the program with torchrun")
    _check_device(device if device is not None or device_map in _SPREADS else device_map)
    hub = Hub(revision=revision, cache_dir=cache_dir, token=token, local_files_only=local_files_only)
    place = _source(source, subfolder=subfolder, hub=hub)
    folder = place.fetch()
    selection = None
    given = {"dtype": _dtype(dtype), "device_map": device_map, "attn_implementation": attn_implementation}
    given |= {"strict": strict and not ignore_mismatched_sizes, "verify": verify}
    given |= {"check_finite": check_finite, "check_size": check_size}
    converter = find_converter(folder)
    whole = {"quantization_config": quantization_config, "distributed_config": distributed_config}
    whole = {name: value for name, value in {**whole, "num_labels": num_labels}.items() if value is not None}
    if whole and (converter or towers is not None or without):
        name = next(iter(whole))
        raise ValueError(f"{name} is for whole models of omnimoe; {_WHOLE_ALONE[name]}")
    if converter is not None:
        if output_loading_info and not given["strict"]:
            raise ValueError(f"what does not fit of {place.name!r} is logged; leave output_loading_info or strict out")
        is_selected = towers is not None or bool(without)
        with _explained(folder, is_whole=False), bars_where_seen():
            model = load_converted(
                place,
                folder,
                converter,
                device=device,
                is_selected=is_selected,
                allow_pickle=allow_pickle,
                **given,
            )
        known = next((name for name in MODELS if weights_of(name) == f"hf-hub:{place.name}"), None)
        if known is not None and not place.is_folder:
            _describe(model, known)
        empty: dict[str, set[str]] = {f"{kind}_keys": set() for kind in ("missing", "unexpected", "mismatched")}
        return (_named(model, place), empty) if output_loading_info else _named(model, place)
    if towers is not None or without:
        if _holds_adapters(folder):
            raise CheckpointError(
                f"{folder} holds adapters, which are loaded with the whole model that they are for; merge them, save "
                "that and load a part of it"
            )
        check_config(folder)
        selection = select(_read_config(folder), towers, without)
    if selection is None:
        place.fetch(_files_to_read(folder, allow_pickle), at=folder)
        if _holds_adapters(folder):
            # their base is fetched too
            given |= {"token": token, "cache_dir": cache_dir, "local_files_only": local_files_only}
        with _explained(folder), bars_where_seen():
            model, report = class_of(folder, num_labels).from_pretrained(
                folder,
                allow_pickle=allow_pickle,
                output_loading_info=True,
                allow_partial=allow_partial,
                **given,
                **whole,
            )
    else:
        plan = pieces(selection)
        place.fetch(weight_files(read_index(folder), {piece.key for piece in plan.values()}), at=folder)
        with _explained(folder, is_whole=False), bars_where_seen():
            model, report = load_pieces(folder, selection, plan, **given)
    misfit = complaint(report)
    if misfit:
        logger.warning("the weights in %s do not fit its config.json; what is missing is fresh.\n%s", folder, misfit)
    model = _named(model if device is None else model.to(device), place)
    family = (model.config.published or {}).get("family", "")
    tell(folder, CONVERTERS.get(family).notice if family in CONVERTERS else "", name=place.name)
    return (model, report) if output_loading_info else model


def _named(model: OmniMoePreTrainedModel, place: Source) -> OmniMoePreTrainedModel:
    """A model that knows the id it was loaded by, which its adapters write down; not where the cache keeps it."""
    if not place.is_folder:
        model.name_or_path = model.config.name_or_path = place.name
    return model


def _files_to_read(folder: Path, allow_pickle: bool) -> list[str]:
    """The files with the weights of a folder whose other files are there: a model, or adapters of one."""
    if _holds_adapters(folder):
        return [ADAPTERS]
    return ["*.safetensors", "*.bin"] if allow_pickle else weight_files(read_index(folder))


def _holds_adapters(folder: Path) -> bool:
    return (folder / CONFIG_OF_ADAPTERS).is_file() and not (folder / "config.json").is_file()


@contextlib.contextmanager
def _explained(folder: Path, *, is_whole: bool = True) -> Iterator[None]:
    """Says where it was that something could not be read, and whose weights they may be that do not fit."""
    try:
        yield
    except (ConfigError, RegistryError) as error:
        raise CheckpointError(f"{folder / 'config.json'}: {error}") from error
    except MisfitError as error:
        raise MisfitError(f"{error}{_near(folder) if is_whole else ''}") from error
    except (torch.OutOfMemoryError, torch.AcceleratorError):
        raise
    except (OSError, RuntimeError) as error:
        raise CheckpointError(f"the weights in {folder} cannot be read: {error}") from error


def _check_device(device: Any) -> None:
    """Refuses a device that is not here, before anything is read, so that it is not taken for a fault of a file."""
    if not isinstance(device, str | torch.device):
        return
    try:
        torch.empty(0, device=device)
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ValueError(f"device {str(device)!r} cannot be used here: {error}; pass another, such as 'cpu'") from error


def _near(folder: Path) -> str:
    """The registered models that weights could be of, as the end of a message."""
    held: dict[str, Entry] = {}
    # a hint only: adapters have no weights of a model, and the misfit is that of their base
    with contextlib.suppress(CheckpointError):
        held = check_weights(folder)
    near = [f"{name} ({fits} weights fit)" for name, fits in closest_models(held)] if held else []
    return f"; of the registered models these are nearest: {', '.join(near)}" if near else ""


def _source(source: str | PathLike[str], *, subfolder: str = "", hub: Hub) -> Source:
    """Where a checkpoint lies; a registered name is no place."""
    check_name(source)
    # plugins are loaded by the look-up: they may bring the parts that the config names
    if isinstance(source, str) and source in MODELS:
        if not Path(source).is_dir():
            raise CheckpointError(f"{source!r} is a registered model, not a checkpoint; call load({source!r})")
        logger.warning("%r is a folder here and a registered model: the folder is read; load() gives the other", source)
    hint = "" if "/" in fspath(source) else f", and no registered model has that name{MODELS.hint(fspath(source))}"
    return Source.find(source, subfolder=subfolder, hub=hub, hint=hint)


def _read_config(folder: Path) -> OmniMoeConfig:
    with _explained(folder):
        return OmniMoeConfig.from_pretrained(folder)


def _config_at(
    source: str,
    *,
    revision: str | None = None,
    subfolder: str = "",
    local_files_only: bool = False,
    cache_dir: str | Path | None = None,
    token: str | bool | None = None,
) -> OmniMoeConfig:
    """The config of a model that lies somewhere; its weights are not fetched."""
    hub = Hub(revision=revision, cache_dir=cache_dir, token=token, local_files_only=local_files_only)
    place = _source(source, subfolder=subfolder, hub=hub)
    folder = place.fetch()
    converter = find_converter(folder)
    if converter is not None:
        fetch_below(place, folder, converter)
        return converter.read(folder)
    if _holds_adapters(folder):
        base = read_json(folder / CONFIG_OF_ADAPTERS, CheckpointError).get("base_model_name_or_path")
        raise CheckpointError(f"{source!r} holds adapters of {base!r}; name that model, or pass pretrained=True")
    check_config(folder)
    return _read_config(folder)


def _arguments(function: Callable[..., Any]) -> frozenset[str]:
    """Names of a function's arguments beside the first."""
    return frozenset(list(inspect.signature(function).parameters)[1:])


def _describe(model: OmniMoePreTrainedModel, name: str) -> None:
    """Gives a model what its family says of it, for the card that is written when it is saved."""
    card, held = card_of(name), model.config.card or {}
    known = card.facts(name) if card else {}
    if "license" in held:  # what the checkpoint says counts, and its name and address are no other licence's
        known.pop("license_name", None)
    model.config.card = {**known, **held}


def _dtype(dtype: str | torch.dtype | None) -> Any:
    if not isinstance(dtype, str) or dtype == "auto":
        return dtype
    found = getattr(torch, dtype, None)
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise ValueError(f"unknown dtype {dtype!r}; write 'float32', 'bfloat16', 'float16' or a torch.dtype")
    return found


@contextlib.contextmanager
def _seeded(seed: int | None, place: torch.device):
    if seed is None:
        yield
        return
    with torch.random.fork_rng(devices=[place] if place.type == "cuda" else []):
        torch.manual_seed(seed)
        yield

"""Tier 8: models by name and models from files.

A name is a registered model of the zoo, of a plugin or of a JSON file; building one never touches the network.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fnmatch
import importlib
import importlib.util
import inspect
import json
import logging
import pkgutil
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from os import PathLike, fspath
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

import omnimoe
from omnimoe.bars import bars_where_seen
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
from omnimoe.checkpoint.fetch import PREFIXES
from omnimoe.checkpoint.folder import check_config
from omnimoe.closest import closest_models
from omnimoe.config import ConfigError
from omnimoe.convert import CONVERTERS, find_converter
from omnimoe.convert.load import load_converted
from omnimoe.flops import UnknownCostError, active_params, flops, total_params
from omnimoe.model import MODELS, OmniMoeConfig, OmniMoeForCausalLM
from omnimoe.plugins import load_plugins
from omnimoe.registry import RegistryError
from omnimoe.towers import load_pieces, pieces, select

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class ModelInfo:
    """What is known of a model without building it.

    Args:
        name: registered name.
        family: the family it belongs to; ``"custom"`` for a model without a card.
        total_params: weights, tied ones once.
        active_params: weights that a token meets, the mean over modalities; None where a part hides its cost.
        active_params_by_modality: the same for each modality.
        flops_per_token: forward, for a sequence of ``sequence_length``, one multiply-add being 2 FLOP; None as above.
        sequence_length: longest sequence the model was made for.
        modalities: names, in the order of their ids.
        is_causal: whether no position depends on a later one.
        license: SPDX name.
        paper: address.
        pretrained: where its weights lie, or None.
        description: one sentence.
    """

    name: str
    family: str
    total_params: int
    active_params: int | None
    active_params_by_modality: dict[str, int] | None
    flops_per_token: float | None
    sequence_length: int
    modalities: tuple[str, ...]
    is_causal: bool
    license: str
    paper: str
    pretrained: str | None
    description: str


def load(
    name: str,
    *,
    pretrained: bool = False,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    seed: int | None = None,
    attn_implementation: str | None = None,
    **overrides: Any,
) -> OmniMoeForCausalLM:
    """A model by name, with fresh weights or with those that were published for it.

    Args:
        name: of :func:`list_models`; or where a model lies, as for :func:`from_pretrained`: its weights with
            ``pretrained``, otherwise fresh ones under its config.
        pretrained: load weights.
        device: where to build; ``"meta"`` takes no memory.
        dtype: of the weights; float32 where None, with ``pretrained`` that of the file.
        seed: of fresh weights; the global generator is left as it was. None draws from the global generator.
        attn_implementation: ``"sdpa"``, ``"eager"``, ``"flex_attention"`` or another that transformers knows.
        overrides: fields of the config to change, ``num_layers=2``; with ``pretrained`` instead arguments of
            :func:`from_pretrained`. Of an address, ``revision``, ``token`` and the like are taken without it too.

    Returns:
        The model, in training mode if fresh and in evaluation mode if pretrained.

    Raises:
        RegistryError: if the name is unknown; the message names the nearest.
        ConfigError: if an override is no field of the config, or does not fit the others.
        ValueError: if weights are asked for and there are none.
    """
    is_address = name not in MODELS and ("/" in name or name.startswith(PREFIXES) or Path(name).is_dir())
    if pretrained:
        source = name if is_address else _weights_of(name)
        if source is None:
            has = ", ".join(list_models(pretrained=True)) or "no registered model yet"
            raise ValueError(f"there are no weights for {name!r}; weights exist for: {has}. Leave pretrained=True out")
        changes = [field for field in overrides if field not in _arguments(from_pretrained)]
        if changes or seed is not None:
            given = ", ".join([*changes, *(["seed"] if seed is not None else [])])
            raise ValueError(f"published weights fit their own config, so {given} cannot be set with pretrained=True")
        overrides |= {"device": device, "dtype": dtype or "auto", "attn_implementation": attn_implementation}
        model = from_pretrained(source, **overrides)
        return model if is_address else _described(model, name)
    if is_address:
        asked = {field: overrides.pop(field) for field in [*overrides] if field in _arguments(_config_at)}
        config = _config_at(name, **asked).replace(**overrides)
    else:
        config = MODELS.get(name)().replace(**overrides)
    if attn_implementation is not None:
        config._attn_implementation = attn_implementation
    place = torch.device(device) if device is not None else torch.get_default_device()
    with _seeded(seed, place), place:
        return OmniMoeForCausalLM._from_config(config, dtype=_dtype(dtype))


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
) -> OmniMoeForCausalLM:
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
        device: where to put the model.
        device_map: transformers' spreading over devices, in place of ``device``.
        strict: refuse a checkpoint with a missing, an unexpected or a misshapen key; otherwise log them.
        local_files_only: look on the Hub's local cache alone.
        cache_dir: of downloads; huggingface_hub's own where None.
        token: for what is private or gated; that of ``hf auth login`` where None, none at all where False.
        attn_implementation: as for :func:`load`.
        verify: compare every file that is read with the hash in the folder's manifest.
        check_finite: ``"warn"``, ``"error"`` or ``"off"`` for weights that are NaN or infinite.
        check_size: refuse a model larger than the memory that is free.
        allow_pickle: read pytorch_model.bin where there is no other file, without running code of it.
        quantization_config: of transformers, or ``"int8"``: torchao's int8 weights for every bank.
        allow_partial: let a quantisation leave some of the layers' weights as they are.

    Returns:
        The model, in evaluation mode.

    Raises:
        CheckpointError: if the checkpoint is missing, malformed, unsafe, or does not fit.
        QuantizationError: if weights of the layers would stay as they are.
        ConfigError: if ``towers`` or ``without`` name what the model does not have, or leave nothing.
    """
    if device is not None and device_map is not None:
        raise ValueError("device and device_map say the same thing twice; pass one of them")
    hub = Hub(revision=revision, cache_dir=cache_dir, token=token, local_files_only=local_files_only)
    place = _source(source, subfolder=subfolder, hub=hub)
    folder = place.fetch()
    selection = None
    given = {"dtype": _dtype(dtype), "device_map": device_map, "attn_implementation": attn_implementation}
    given |= {"strict": strict, "verify": verify, "check_finite": check_finite, "check_size": check_size}
    converter = find_converter(folder)
    if quantization_config is not None and (converter or towers is not None or without):
        raise ValueError(
            "quantization_config is for whole models of omnimoe; load this one without and call omnimoe.quantize(model)"
        )
    if converter is not None:
        is_selected = towers is not None or bool(without)
        with _explained(folder, is_whole=False), bars_where_seen():
            return load_converted(place, folder, converter, device=device, is_selected=is_selected, **given)
    if towers is not None or without:
        check_config(folder)
        selection = select(_read_config(folder), towers, without)
    if selection is None:
        place.fetch(_files_to_read(folder, allow_pickle), at=folder)
        with _explained(folder), bars_where_seen():
            model, report = OmniMoeForCausalLM.from_pretrained(
                folder,
                allow_pickle=allow_pickle,
                output_loading_info=True,
                quantization_config=quantization_config,
                allow_partial=allow_partial,
                **given,
            )
    else:
        plan = pieces(selection)
        place.fetch(weight_files(read_index(folder), {piece.key for piece in plan.values()}), at=folder)
        with _explained(folder, is_whole=False), bars_where_seen():
            model, report = load_pieces(folder, selection, plan, **given)
    misfit = complaint(report)
    if misfit:
        logger.warning("the weights in %s do not fit its config.json; what is missing is fresh.\n%s", folder, misfit)
    return model if device is None else model.to(device)


def _files_to_read(folder: Path, allow_pickle: bool) -> list[str]:
    """The files with the weights of a folder whose other files are there: a model, or adapters of one."""
    if (folder / "adapter_config.json").is_file() and not (folder / "config.json").is_file():
        return ["adapter_model.safetensors"]
    return ["*.safetensors", "*.bin"] if allow_pickle else weight_files(read_index(folder))


@contextlib.contextmanager
def _explained(folder: Path, *, is_whole: bool = True) -> Iterator[None]:
    """Says where it was that something could not be read, and whose weights they may be that do not fit."""
    try:
        yield
    except (ConfigError, RegistryError) as error:
        raise CheckpointError(f"{folder / 'config.json'}: {error}") from error
    except MisfitError as error:
        raise MisfitError(f"{error}{_near(folder) if is_whole else ''}") from error
    except (OSError, RuntimeError) as error:
        raise CheckpointError(f"the weights in {folder} cannot be read: {error}") from error


def _near(folder: Path) -> str:
    """The registered models that weights could be of, as the end of a message."""
    near = [f"{name} ({fits} weights fit)" for name, fits in closest_models(check_weights(folder))]
    return f"; of the registered models these are nearest: {', '.join(near)}" if near else ""


def list_models(
    filter: str = "",
    *,
    family: str | None = None,
    modality: str | None = None,
    pretrained: bool = False,
    exclude: str | Iterable[str] = "",
) -> list[str]:
    """Names of registered models, sorted.

    Args:
        filter: a pattern with ``*`` and ``?``, or a part of the name.
        family: keep one family.
        modality: keep models that have it.
        pretrained: keep models with weights.
        exclude: a pattern as in ``filter``, or several.

    Example:
        >>> list_models("mot_*b", exclude="*transfusion*")
        ['mot_1_5b', 'mot_7b']
    """
    excluded = [exclude] if isinstance(exclude, str) else list(exclude)
    return [
        name
        for name in MODELS
        if _matches(name, filter)
        and not any(pattern and _matches(name, pattern) for pattern in excluded)
        and (family is None or _family_of(name) == family)
        and (modality is None or modality in MODELS.get(name)().modality_names)
        and (not pretrained or _weights_of(name) is not None)
    ]


def model_info(name: str) -> ModelInfo:
    """What is known of a registered model; it is counted without memory.

    Raises:
        RegistryError: if the name is unknown; the message names the nearest.
    """
    make = MODELS.get(name)
    config, card = make(), _card_of(name)
    active, by_modality, per_token = None, None, None
    with contextlib.suppress(UnknownCostError):
        by_modality = {held: active_params(config, held) for held in config.modality_names}
        active, per_token = active_params(config), flops(config).per_token
    return ModelInfo(
        name=name,
        family=_family_of(name),
        total_params=total_params(config),
        active_params=active,
        active_params_by_modality=by_modality,
        flops_per_token=per_token,
        sequence_length=config.max_position_embeddings,
        modalities=config.modality_names,
        is_causal=config.is_causal,
        license=card.license if card else "unknown",
        paper=card.papers.get(name, card.paper) if card else "",
        pretrained=_weights_of(name),
        description=(make.__doc__ or "").strip().partition("\n")[0],
    )


def add_model_config(path: str | PathLike[str], *, exist_ok: bool = False) -> str:
    """Registers a model that a JSON file describes, under the name of the file.

    Args:
        path: a file as ``config.to_json_file`` writes it, ``my_model.json``.
        exist_ok: replace a model of the same name.

    Returns:
        The name.

    Raises:
        ConfigError: if the file is no config.
        RegistryError: if the name is malformed or taken.
    """
    path = Path(path)
    plain = read_json(path, ConfigError)
    if plain.get("model_type", "omnimoe") != "omnimoe":
        raise ConfigError(f"{path} describes a model of type {plain['model_type']!r}, not 'omnimoe'")
    known = {field.name for field in dataclasses.fields(OmniMoeConfig)} | {"model_type", "transformers_version"}
    unknown = sorted(set(plain) - known - set(OmniMoeConfig.attribute_map) - set(OmniMoeConfig().to_dict()))
    if unknown:
        raise ConfigError(f"{path} has unknown fields: {', '.join(unknown)}")
    MODELS.names()
    text = json.dumps(plain)

    def make() -> OmniMoeConfig:
        return OmniMoeConfig.from_dict(json.loads(text))

    make.__doc__ = f"Declared in {path.name}."
    try:
        make()
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{path}: {error}") from error
    MODELS.register(path.stem, exist_ok=exist_ok)(make)
    return path.stem


def load_zoo() -> None:
    """Imports every family of the zoo, then the plugins; runs by itself on first use of a model's name."""
    zoo = _import_zoo()
    for found in sorted(pkgutil.iter_modules(zoo.__path__), key=lambda found: found.name):
        if found.ispkg:
            importlib.import_module(f"{zoo.__name__}.{found.name}")
    load_plugins(again=True)


def _import_zoo() -> ModuleType:
    """``omnimoe.zoo``, which in a checkout that was not installed lies beside the package."""
    name = "omnimoe.zoo"
    if name in sys.modules or importlib.util.find_spec(name) is not None:
        return importlib.import_module(name)
    folder = Path(fspath(omnimoe.__file__ or "")).parents[1] / "zoo"
    spec = importlib.util.spec_from_file_location(
        name, folder / "__init__.py", submodule_search_locations=[str(folder)]
    )
    if not (folder / "__init__.py").is_file() or spec is None or spec.loader is None:
        raise ImportError(f"the package omnimoe.zoo is missing, and so is {folder}; install omnimoe again")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    omnimoe.zoo = module
    return module


MODELS.on_first_use(load_zoo)
CONVERTERS.on_first_use(MODELS.names)


def _card_of(name: str) -> Any:
    """The ``CARD`` of the module that declares a model, or None."""
    return getattr(sys.modules.get(getattr(MODELS.get(name), "__module__", "")), "CARD", None)


def _family_of(name: str) -> str:
    card = _card_of(name)
    return card.family if card else "custom"


def _weights_of(name: str) -> str | None:
    """Where a model's weights lie, for :func:`from_pretrained`, or None."""
    card = _card_of(name)
    source = card.weights.get(name) if card else None
    if source is None or source.startswith("hf-hub:"):
        return source
    beside = Path(fspath(sys.modules[MODELS.get(name).__module__].__file__ or "")).parent / source
    return f"local-dir:{beside}"


def _source(source: str | PathLike[str], *, subfolder: str = "", hub: Hub) -> Source:
    """Where a checkpoint lies; a registered name is no place."""
    # plugins are loaded by the look-up: they may bring the parts that the config names
    if isinstance(source, str) and source in MODELS and not Path(source).is_dir():
        raise CheckpointError(f"{source!r} is a registered model, not a checkpoint; call load({source!r})")
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
    folder = _source(source, subfolder=subfolder, hub=hub).fetch()
    converter = find_converter(folder)
    if converter is not None:
        return converter.read(folder)
    check_config(folder)
    return _read_config(folder)


def _arguments(function: Callable[..., Any]) -> frozenset[str]:
    """Names of a function's arguments beside the first."""
    return frozenset(list(inspect.signature(function).parameters)[1:])


def _described(model: OmniMoeForCausalLM, name: str) -> OmniMoeForCausalLM:
    """A model with what its family says of it, for the card that is written when it is saved."""
    card = _card_of(name)
    known = {"license": card.license.lower(), "paper": card.papers.get(name, card.paper)} if card else {}
    model.config.card = {**known, **(getattr(model.config, "card", None) or {})}
    return model


def _matches(name: str, pattern: str) -> bool:
    return fnmatch.fnmatchcase(name, pattern if re.search(r"[*?\[]", pattern) else f"*{pattern}*")


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

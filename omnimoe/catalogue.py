"""Tier 8: which models there are, and what is known of them. Nothing here touches the network.

A name is a registered model of the zoo, of a plugin or of a JSON file.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fnmatch
import importlib
import importlib.util
import json
import pkgutil
import re
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from os import PathLike, fspath
from pathlib import Path
from types import ModuleType
from typing import Any

import omnimoe
from omnimoe.checkpoint import read_json
from omnimoe.config import ConfigError
from omnimoe.convert import CONVERTERS
from omnimoe.flops import UnknownCostError, active_params, flops, total_params
from omnimoe.model import MODELS, OmniMoeConfig
from omnimoe.plugins import load_plugins


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
        related: addresses of other papers that its family draws on.
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
    related: tuple[str, ...]
    pretrained: str | None
    description: str


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
        and (family is None or family_of(name) == family)
        and (modality is None or modality in MODELS.get(name)().modality_names)
        and (not pretrained or weights_of(name) is not None)
    ]


def model_info(name: str) -> ModelInfo:
    """What is known of a registered model; it is counted without memory.

    Raises:
        RegistryError: if the name is unknown; the message names the nearest.
    """
    make = MODELS.get(name)
    config, card = make(), card_of(name)
    active, by_modality, per_token = None, None, None
    with contextlib.suppress(UnknownCostError):
        by_modality = {held: active_params(config, held) for held in config.modality_names}
        active, per_token = active_params(config), flops(config).per_token
    return ModelInfo(
        name=name,
        family=family_of(name),
        total_params=total_params(config),
        active_params=active,
        active_params_by_modality=by_modality,
        flops_per_token=per_token,
        sequence_length=config.max_position_embeddings,
        modalities=config.modality_names,
        is_causal=config.is_causal,
        license=card.license_of(name) if card else "unknown",
        paper=card.papers.get(name, card.paper) if card else "",
        related=tuple(paper for paper in card.related if paper != card.papers.get(name)) if card else (),
        pretrained=weights_of(name),
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


def card_of(name: str) -> Any:
    """The ``CARD`` of the module that declares a model, or None."""
    return getattr(sys.modules.get(getattr(MODELS.get(name), "__module__", "")), "CARD", None)


def family_of(name: str) -> str:
    card = card_of(name)
    return card.family if card else "custom"


def weights_of(name: str) -> str | None:
    """Where a model's weights lie, for :func:`from_pretrained`, or None."""
    card = card_of(name)
    source = card.weights.get(name) if card else None
    if source is None or source.startswith("hf-hub:"):
        return source
    beside = Path(fspath(sys.modules[MODELS.get(name).__module__].__file__ or "")).parent / source
    return f"local-dir:{beside}"


def _matches(name: str, pattern: str) -> bool:
    return fnmatch.fnmatchcase(name, pattern if re.search(r"[*?\[]", pattern) else f"*{pattern}*")

"""What a family declares of its published checkpoints, and which family a folder belongs to."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omnimoe.checkpoint import CheckpointError, read_json
from omnimoe.checkpoint.folder import inside
from omnimoe.config import COUNT_LIMIT, SIZE_LIMIT, ConfigError
from omnimoe.convert.rules import Plan, Rule, Shape, make_plan
from omnimoe.model import OmniMoeConfig, OmniMoeForCausalLM
from omnimoe.registry import Registry

logger = logging.getLogger(__name__)

CONFIG = "config.json"
_LAYER_LIMIT = 4096
"""Layers of the deepest model, as in our own configs."""
JsonFiles = Mapping[str, dict[str, Any]]


def _nothing_tied(config: OmniMoeConfig) -> dict[str, str]:
    return {}


def _nothing_filled(config: OmniMoeConfig) -> dict[str, Shape]:
    return {}


@dataclass(frozen=True, kw_only=True)
class Converter:
    """The way from published checkpoints of a family to ours, and back.

    Args:
        name: of the family, as it is registered.
        config: our config, from the JSON files by name.
        rules: the table for a config; see :mod:`omnimoe.convert.rules`.
        model_types: the ``model_type`` of the ``config.json`` files that the family serves. Without any, a folder
            belongs to the family where all its JSON files are there, but for those that others stand in for.
        json_files: JSON files that describe a checkpoint.
        weight_files: for each prefix that published names are given, the safetensors file.
        tied: published names that repeat another one, for a config: a file may hold them or not.
        ignored: patterns of whole published names that have no place in our model on purpose, each with the reason;
            or these for a config.
        spellings: patterns of names as some files have them, each with the published name; in order, and only where a
            file lacks that name.
        filled: published tensors that no model reads, for a config: they are ignored where they are read, and written
            as zeros, so that whoever wants every name finds it.
        described_by: whether ``config.json`` describes a checkpoint of the family, where it has no ``model_type``.
        optional: patterns of published names by the name of the group they form, which a file may lack as a whole and
            not in part; what they give then keeps its start, and the group is left out where weights are written back,
            unless it was trained meanwhile.
        stand_ins: what is read in place of a JSON file that a copy may lack.
        fresh: names of ours that no published tensor gives.
        kept: patterns of whole published names that have no place in our model, each with the safetensors file in
            which they go along where a folder is converted; they are put back where it is written back.
        beside: further files, patterns of files, and folders of files, that go along as they are where a folder is
            converted.
        in_one_file: the published weights are one file, however large, which other programs open by its name.
        notice: what the licence of the weights restricts, logged when they are loaded; where empty, a licence in the
            checkpoint's own card that may restrict is.
        license: of all weights of the family, where there is one for all; it goes with a model whose checkpoint says
            nothing of its licence.
    """

    name: str
    config: Callable[[JsonFiles], OmniMoeConfig]
    rules: Callable[[OmniMoeConfig], Iterable[Rule]]
    model_types: tuple[str, ...] = ()
    json_files: tuple[str, ...] = (CONFIG,)
    weight_files: Mapping[str, str] = field(default_factory=lambda: {"": "model.safetensors"})
    tied: Callable[[OmniMoeConfig], dict[str, str]] = _nothing_tied
    ignored: Mapping[str, str] | Callable[[OmniMoeConfig], Mapping[str, str]] = field(default_factory=dict)
    spellings: Mapping[str, str] = field(default_factory=dict)
    filled: Callable[[OmniMoeConfig], dict[str, Shape]] = _nothing_filled
    described_by: Callable[[Mapping[str, Any]], bool] | None = None
    optional: Mapping[str, str] = field(default_factory=dict)
    stand_ins: JsonFiles = field(default_factory=dict)
    fresh: Callable[[OmniMoeConfig], Iterable[str]] = _nothing_tied
    kept: Mapping[str, str] = field(default_factory=dict)
    beside: tuple[str, ...] = ()
    in_one_file: bool = False
    notice: str = ""
    license: str = ""

    def read(self, folder: Path) -> OmniMoeConfig:
        """Our config of a folder, its weights unread.

        Raises:
            CheckpointError: as :meth:`config_of`, or if a file is missing.
        """
        lacking = self.lacking(folder)
        missing = [name for name in lacking if name not in self.stand_ins]
        if missing:
            raise CheckpointError(f"{folder} has no {missing[0]}, which a {self.name} checkpoint has")
        for name in lacking:
            logger.warning("%s has no %s; that of the published model stands in", folder, name)
        held = [name for name in self.json_files if name not in lacking]
        read = {name: read_json(inside(folder, name), CheckpointError) for name in held}
        return self.config_of({**read, **{name: dict(self.stand_ins[name]) for name in lacking}})

    def lacking(self, folder: Path) -> list[str]:
        """The JSON files that a folder does not have."""
        return [name for name in self.json_files if not (folder / name).is_file()]

    def config_of(self, files: JsonFiles | dict[str, Any]) -> OmniMoeConfig:
        """Our config, which remembers the published one, so that weights can be written back.

        Args:
            files: the JSON files by name, or the one file of a family that has one.

        Raises:
            CheckpointError: if a value is missing, malformed, or asks for what the parts here do not do.
        """
        held = dict(files) if set(files) == set(self.json_files) else {self.json_files[0]: dict(files)}
        check_counts(held)
        try:
            config = self.config(held)
        except ConfigError as error:
            raise CheckpointError(f"the config of this {self.name} checkpoint does not fit: {error}") from error
        except (LookupError, TypeError, AttributeError, ArithmeticError) as error:
            raise CheckpointError(f"the config of this {self.name} checkpoint is malformed: {error!r}") from error
        config.published = {"family": self.name, "files": held}
        return config

    def plan(self, model: OmniMoeForCausalLM) -> Plan:
        """The table, expanded for a model of any device, the meta device too."""
        twins = set(getattr(model, "all_tied_weights_keys", {}))
        shapes = {name: tuple(held.shape) for name, held in model.state_dict().items() if name not in twins}
        return make_plan(self.rules(model.config), shapes, fresh=self.fresh(model.config))

    def reason_to_ignore(self, name: str, config: OmniMoeConfig) -> str | None:
        """Why a published name has no place here, or None where it should have one."""
        if name in self.filled(config):
            return "nothing reads them"
        if self.file_to_keep(name) is not None:
            return "they go along where the folder is converted"
        patterns = self.ignored(config) if callable(self.ignored) else self.ignored
        return next((why for pattern, why in patterns.items() if re.fullmatch(pattern, name)), None)

    def group(self, name: str, names: Iterable[str]) -> list[str]:
        """Those of some published names that belong to an optional group.

        Args:
            name: of the group.
            names: published names.
        """
        return [held for held in names if re.fullmatch(self.optional[name], held)]

    def absent_groups(self, config: OmniMoeConfig) -> list[str]:
        """Optional groups that the file of a config lacked.

        Raises:
            CheckpointError: if the config names a group that the family does not have.
        """
        absent = list(config.published.get("absent", ()))
        for name in absent:
            if name not in self.optional:
                raise CheckpointError(f"the config says that {name!r} is absent, but {self.name} has no such group")
        return absent

    def file_to_keep(self, name: str) -> str | None:
        """The file in which a published name without a place goes along; None where it does not."""
        return next((file for pattern, file in self.kept.items() if re.fullmatch(pattern, name)), None)

    def serves(self, folder: Path) -> bool:
        """Whether a folder holds a checkpoint of the family."""
        if self.model_types:
            plain = _plain_config(folder)
            kind = plain.get("model_type")
            described = self.described_by is not None and kind is None and self.described_by(plain)
            return described or kind in self.model_types
        return set(self.lacking(folder)) <= set(self.stand_ins)


def check_counts(files: JsonFiles) -> None:
    """Refuses whole numbers past those of any model, for which lists of their length would be made.

    Args:
        files: the JSON files by name.

    Raises:
        CheckpointError: with the file, the field and its value.
    """
    rest: list[tuple[str, str, Any]] = [(file, "", plain) for file, plain in files.items()]
    while rest:
        file, name, value = rest.pop()
        if isinstance(value, Mapping):
            # the words of a vocabulary are no fields: one may be "layers"
            is_map = name.endswith("_map")
            rest += [(file, name if is_map else str(key), item) for key, item in value.items()]
        elif isinstance(value, list):
            rest += [(file, name, item) for item in value]
        elif isinstance(value, int) and abs(value) > (limit := _limit(name)):
            raise CheckpointError(f"{file} gives {name} {value:,}, beyond any model; at most {limit:,} is taken")


def _limit(name: str) -> int:
    if re.search(r"layers?$", name):
        return _LAYER_LIMIT
    return COUNT_LIMIT if name.startswith("num_") else SIZE_LIMIT


CONVERTERS: Registry[Converter] = Registry("converter")


def register_converter(converter: Converter, *, exist_ok: bool = False) -> Converter:
    """Files a converter under its name.

    Raises:
        RegistryError: if the name is malformed or taken.
    """
    return CONVERTERS.register(converter.name, exist_ok=exist_ok)(converter)


def find_converter(folder: Path) -> Converter | None:
    """The converter of a folder; None where it holds a model of omnimoe, or of no family that is known.

    Raises:
        CheckpointError: if its config.json is no file, or a link that leads out of it.
    """
    if _model_type(folder) == "omnimoe":
        return None
    found = [held for held in (CONVERTERS.get(name) for name in CONVERTERS) if held.serves(folder)]
    # a family that finds all its files knows more than one for which others stand in
    return min(found, key=lambda held: len(held.lacking(folder)), default=None)


def _model_type(folder: Path) -> str | None:
    """None where ``config.json`` is missing or broken, which a family with files of its own does not mind."""
    kind = _plain_config(folder).get("model_type")
    return kind if isinstance(kind, str) else None


def _plain_config(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG
    if not (path.exists() or path.is_symlink()):
        return {}
    inside(folder, CONFIG)
    try:
        return read_json(path, CheckpointError)
    except CheckpointError:
        return {}

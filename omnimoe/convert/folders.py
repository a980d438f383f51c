"""Whole folders, one way and the other, without ever holding a model: tensors stream from file to file."""

from __future__ import annotations

import contextlib
import inspect
import json
import logging
import shutil
import sys
from collections.abc import Callable, Collection, Iterable, Iterator
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from omnimoe.checkpoint import CheckpointError, read_json
from omnimoe.checkpoint.folder import PICKLES, inside
from omnimoe.convert.absent import is_changed
from omnimoe.convert.converter import CONFIG, CONVERTERS, Converter
from omnimoe.convert.files import Held, Weights, main_dtype, write_weights
from omnimoe.convert.published import ROWS, Published
from omnimoe.convert.rules import Plan, Shape
from omnimoe.model import OmniMoeConfig, OmniMoeForCausalLM
from omnimoe.model_card import README, text_of, write_card
from omnimoe.publish import MANIFEST, SEALED, family_of, publish, read_manifest

logger = logging.getLogger(__name__)

BESIDE = (
    "generation_config.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
    "preprocessor_config.json",
    "processor_config.json",
    "LICENSE",
    "README.md",
)
"""Files that go along as they are, tokenizers among them."""

SHARD = "5GB"
"""Of the weights in a file, where nothing else is asked for."""
_FREE = {"use_cache", "output_router_logits", "initializer_range", "published"}
"""Fields of a config that weights do not depend on."""


def check_destination(destination: Path, converter: Converter, overwrite: bool) -> None:
    """Refuses a folder with files that a conversion would replace, unless that is asked for.

    Raises:
        CheckpointError: naming them.
    """
    if overwrite or not destination.is_dir():
        return
    weights = ["model.safetensors", *converter.weight_files.values()]
    names = {CONFIG, MANIFEST, SEALED, *BESIDE, *converter.json_files, *weights}
    families = {family_of(name) for name in weights}
    shards = {path.name for path in destination.iterdir() if family_of(path.name) in families}
    beside = {path.relative_to(destination).as_posix() for path in _beside(destination, converter)}
    held = sorted({name for name in names if (destination / name).exists()} | shards | beside)
    if held:
        more = f" and {len(held) - 3} more" if len(held) > 3 else ""
        raise CheckpointError(
            f"{destination} holds {', '.join(held[:3])}{more} already; name another folder, or pass overwrite=True "
            "(--overwrite) to replace them"
        )


def to_omnimoe(
    folder: Path,
    destination: Path,
    converter: Converter,
    *,
    strict: bool = True,
    max_shard_size: int | str | None = None,
    overwrite: bool = False,
) -> Plan:
    """Writes a published checkpoint as one of ours; types stay as they are.

    Args:
        folder: the published checkpoint.
        destination: where to.
        converter: of its family.
        strict: as for :class:`~omnimoe.convert.published.Published`; only a whole checkpoint can be written.
        max_shard_size: bytes of a file; 5 GB where None.
        overwrite: replace what another save or conversion has written there.

    Returns:
        The plan that was followed.

    Raises:
        CheckpointError: if the weights do not fit, or the files are there already; nothing is written then.
    """
    check_destination(destination, converter, overwrite)
    with Published(folder, converter, strict=strict) as held:
        skipped = sorted(held.skipped)
        if skipped:
            raise CheckpointError(
                f"{folder} lacks {len(skipped)} tensors, {skipped[0]} for one, so it cannot be converted file by file; "
                "load it with from_pretrained and save the model"
            )
        by_ours, dtypes = held.plan.by_ours(), held.weights.dtypes
        tensors = {name: (dtypes[by_ours[name][0].published], shape) for name, shape in held.plan.ours.items()}
        config = held.config
        config.architectures, config.dtype = [OmniMoeForCausalLM.__name__], held.dtype
        with publish(destination, needed=_bytes(tensors.values()), replaces=_saved(destination)) as fresh:
            config.save_pretrained(fresh)
            size = SHARD if max_shard_size is None else max_shard_size
            write_weights(fresh, tensors, lambda name: held.parts(by_ours[name]), max_shard_size=size)
            _copy_beside(folder, fresh, converter)
            _write_kept(held, fresh)
            if not (fresh / README).exists():
                write_card(held.meta.to(held.dtype), fresh, name=destination.name, held=text_of(destination / README))
        return held.plan


def to_published(
    source: Path | OmniMoeForCausalLM,
    destination: Path,
    *,
    max_shard_size: int | str | None = None,
    overwrite: bool = False,
    outline: bool = False,
) -> Converter:
    """Writes a model that came from a published checkpoint in the layout it came in.

    Args:
        source: a folder of ours, or a model.
        destination: where to.
        max_shard_size: bytes of a file; 5 GB where None, or one file where the family's is one.
        overwrite: replace what another save or conversion has written there.
        outline: write names, shapes and types without the numbers, of a model.

    Returns:
        The converter of its family.

    Raises:
        CheckpointError: if the model came from no published checkpoint, is no longer of the shape it had then, has no
            numbers, or the files are there already.
    """
    if isinstance(source, Path):
        config = OmniMoeConfig.from_dict(read_json(inside(source, CONFIG), CheckpointError))
        converter = _family_of(config, str(source))
        check_destination(destination, converter, overwrite)
        with torch.device("meta"):
            plan = converter.plan(OmniMoeForCausalLM(config))
        with Weights(source) as weights:
            _export(weights, plan, converter, config, destination, max_shard_size, source, False)
        return converter
    converter = _family_of(source.config, "this model")
    check_destination(destination, converter, overwrite)
    held = Held(source.state_dict())
    if held.is_outline and not outline:
        hollow = next(name for name, tensor in held.tensors.items() if tensor.is_meta)
        raise CheckpointError(
            f"{hollow} of this model is on the meta device and has no numbers to write; load it without device='meta', "
            "or pass outline=True to write names, shapes and types alone"
        )
    _export(held, converter.plan(source), converter, source.config, destination, max_shard_size, None, outline)
    return converter


def _export(
    weights: Weights | Held,
    plan: Plan,
    converter: Converter,
    config: OmniMoeConfig,
    destination: Path,
    max_shard_size: int | str | None,
    beside: Path | None,
    outline: bool,
) -> None:
    missing = [name for name, shape in plan.ours.items() if weights.shapes.get(name) != shape]
    if missing:
        raise CheckpointError(
            f"{missing[0]} is {weights.shapes.get(missing[0], 'missing')}, where the config wants "
            f"{plan.ours[missing[0]]}"
        )
    by_published = plan.by_published()
    tensors = {name: (weights.dtypes[by_published[name][0].ours], shape) for name, shape in plan.published.items()}
    for group in converter.absent_groups(config):
        if not weights.is_outline and is_changed(weights, plan, converter, config, group):
            logger.warning("%s is written with the %s, read without it and changed since", destination, group)
            continue
        left_out = converter.group(group, list(tensors))
        logger.warning("%s is written without the %s, as it was read", destination, group)
        tensors = {name: held for name, held in tensors.items() if name not in left_out}
    twins = converter.tied(config)
    for name in config.published.get("repeated", ()):
        if name not in twins:
            raise CheckpointError(
                f"the config says that {name} is repeated, but {converter.name} repeats no such tensor"
            )
        tensors[name], by_published[name] = tensors[twins[name]], by_published[twins[name]]

    for name, shape in converter.filled(config).items():
        tensors[name], by_published[name] = (main_dtype(weights.dtypes, weights.shapes), shape), []

    kept = _read_kept(beside, converter)
    tensors |= {name: (held.dtype, tuple(held.shape)) for name, held in kept.items()}
    if lost := [name for name in config.published.get("kept", ()) if name not in kept]:
        logger.warning(
            "%s is written without %d tensors that its file held beside the model, %s for one: a loaded model does not "
            "take them along, a converted folder does",
            *(destination, len(lost), lost[0]),
        )

    def parts(name: str) -> Iterator[Tensor]:
        if name in kept:
            yield kept[name]
            return
        pieces = by_published[name]
        if not pieces:
            kind, shape = tensors[name]
            starts = range(0, shape[0], ROWS)
            yield from (torch.zeros(min(ROWS, shape[0] - start), *shape[1:], dtype=kind) for start in starts)
        for piece in pieces:
            tensor = weights.read(piece.ours, piece.region)
            yield piece.change.back(tensor.squeeze(0) if len(piece.region) == 2 else tensor)

    files = config.published["files"]
    if max_shard_size is None:
        max_shard_size = sys.maxsize if converter.in_one_file else SHARD
    needed = 0 if outline else _bytes(tensors.values())
    with publish(destination, needed=needed, replaces=_saved(destination)) as fresh:
        dtype = str(main_dtype(weights.dtypes, weights.shapes)).removeprefix("torch.")
        for name, plain in files.items():
            kind = next((key for key in ("dtype", "torch_dtype") if key in plain), None)
            written = plain if kind is None else {**plain, kind: dtype}
            (fresh / name).parent.mkdir(parents=True, exist_ok=True)
            (fresh / name).write_text(json.dumps(written, indent=2) + "\n", encoding="utf-8")
        for prefix, file in converter.weight_files.items():
            mine = {name: held for name, held in tensors.items() if _prefix_of(name, converter) == prefix}
            stored = {name.removeprefix(prefix): held for name, held in mine.items()}
            read = _reader(prefix, parts)
            write_weights(fresh, stored, read, file=file, max_shard_size=max_shard_size, outline=outline)
        if beside is not None:
            _copy_beside(beside, fresh, converter, without=frozenset(converter.kept.values()))


def _reader(prefix: str, parts: Callable[[str], Iterator[Tensor]]) -> Callable[[str], Iterator[Tensor]]:
    return lambda name: parts(prefix + name)


def _prefix_of(name: str, converter: Converter) -> str:
    return max((prefix for prefix in converter.weight_files if name.startswith(prefix)), key=len)


def _family_of(config: OmniMoeConfig, what: str) -> Converter:
    """The converter that a config remembers, where the config is still the one that was made of the published one."""
    if not config.published:
        raise CheckpointError(
            f"{what} came from no published checkpoint, so there is no layout to write it in; keep it as it is"
        )
    converter = CONVERTERS.get(config.published.get("family", ""))
    if set(config.published.get("files", ())) != set(converter.json_files):
        raise CheckpointError(
            f"{what} has lost the {converter.name} config it came with, {', '.join(converter.json_files)}, and cannot "
            "be written in that layout; keep it as it is"
        )
    made = converter.config_of(config.published["files"]).to_dict()
    now = config.to_dict()
    changed = [
        name for name in inspect.get_annotations(OmniMoeConfig) if name not in _FREE and made.get(name) != now.get(name)
    ]
    if changed:
        raise CheckpointError(
            f"{what} was a {converter.name} checkpoint, but {', '.join(changed)} of its config changed since, and "
            f"{converter.name} has no form for that; keep it as a model of omnimoe"
        )
    return converter


def _saved(folder: Path) -> set[str]:
    """Names of what an earlier save or conversion wrote, all of which go; of files of somebody else's, none."""
    with contextlib.suppress(ValueError):
        return set(read_manifest(folder))
    return set()


def _bytes(tensors: Iterable[tuple[torch.dtype, Shape]]) -> int:
    return sum(dtype.itemsize * prod(shape) for dtype, shape in tensors)


def _write_kept(held: Published, destination: Path) -> None:
    """Writes what of a file has no place in our model, but goes along."""
    kept: dict[str, dict[str, tuple[torch.dtype, Shape]]] = {}
    for name, shape in held.weights.shapes.items():
        file = None if name in held.plan.published else held.converter.file_to_keep(name)
        if file is not None:
            kept.setdefault(file, {})[name] = held.weights.dtypes[name], shape
    for file, tensors in kept.items():
        write_weights(destination, tensors, lambda name: [held.weights.read(name)], file=file, max_shard_size="1TB")


def _read_kept(folder: Path | None, converter: Converter) -> dict[str, Tensor]:
    """What :func:`_write_kept` wrote into a folder, if there is one."""
    found: dict[str, Tensor] = {}
    for file in dict.fromkeys(converter.kept.values()):
        if folder is not None and (folder / file).is_file():
            with Weights(folder, {"": file}) as held:
                found |= {name: held.read(name) for name in held.shapes if converter.file_to_keep(name) == file}
    return found


def _beside(folder: Path, converter: Converter) -> list[Path]:
    """What goes along, of what a folder has."""
    names = dict.fromkeys((*BESIDE, *converter.kept.values(), *converter.beside))
    return [path for name in names for path in sorted(folder.glob(name))]


def _copy_beside(
    folder: Path, destination: Path, converter: Converter, *, without: Collection[str] = frozenset()
) -> None:
    for held in _beside(folder, converter):
        if held.name in without:
            continue
        files = sorted(held.iterdir()) if held.is_dir() else [held]
        for path in files:
            if path.is_file() and path.suffix not in PICKLES:
                place = path.relative_to(folder).as_posix()
                (destination / place).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(inside(folder, place), destination / place)

"""What is checked of a folder before anything in it is used: which files, where they lie, and what they declare."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from omnimoe.checkpoint.errors import CheckpointError, read_json
from omnimoe.checkpoint.header import Entry, read_header
from omnimoe.checkpoint.report import runs_of
from omnimoe.publish import settle

PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".distcp")
_LABEL_LIMIT = 2**20
_RANK_LOCAL = re.compile(r"shard-\d{5}-model-\d{5}-of-\d{5}\.safetensors")


def check_folder(folder: Path, *, variant: str | None = None) -> dict[str, Entry]:
    """Refuses a folder that is no checkpoint of ours, before anything in it is used.

    Args:
        folder: of a saved model.
        variant: of the weights, ``model.<variant>.safetensors``.

    Returns:
        The weights by name, as their headers declare them.

    Raises:
        CheckpointError: if its config or its weights are missing, malformed or unsafe.
    """
    check_config(folder)
    return check_weights(folder, variant=variant)


def end_broken_save(folder: Path) -> None:
    """Ends a save that was broken off when its files were whole.

    Raises:
        CheckpointError: if that cannot be done.
    """
    try:
        settle(folder)
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"a save into {folder} was broken off and cannot be ended: {error}; make the folder writable, or copy it"
        ) from error


def check_config(folder: Path) -> None:
    """Refuses a folder whose config.json is missing, malformed, or of another kind of model."""
    if not (folder / "config.json").exists():
        raise CheckpointError(f"{folder} has no config.json, so it is no saved model; write it with save_pretrained")
    plain = read_json(inside(folder, "config.json"), CheckpointError)
    kind = plain.get("model_type")
    if kind != "omnimoe":
        raise CheckpointError(f"{folder} holds a model of type {kind!r}, not 'omnimoe'; convert it first")
    if plain.get("transformers_weights") is not None:
        raise CheckpointError(
            f"{folder / 'config.json'} names its weights {plain['transformers_weights']!r}; only model.safetensors and "
            "its shards are read, so remove transformers_weights"
        )
    _check_values(folder / "config.json", plain)
    check_generation(folder)
    if (folder / "manifest.json").exists():
        inside(folder, "manifest.json")


def names_implementation(folder: Path) -> bool:
    """Whether the config in a folder says by which implementation a model computes, which saves leave out."""
    path = folder / "config.json"
    return path.exists() and any(name.endswith("implementation") for name in read_json(path, CheckpointError))


def check_generation(folder: Path) -> None:
    """Refuses a generation_config.json that is malformed, or has values that no generation takes; none is none.

    Raises:
        CheckpointError: with the file and the value.
    """
    from transformers import GenerationConfig

    path = folder / "generation_config.json"
    if not path.exists():
        return
    # transformers goes on without one that it cannot read
    plain = read_json(inside(folder, path.name), CheckpointError)
    for name, default in GenerationConfig._get_default_generation_params().items():
        value = plain.get(name)
        kind, text = (bool, "true or false") if isinstance(default, bool) else (int | float, "a number")
        is_wrong = not isinstance(value, kind) or isinstance(value, bool) != isinstance(default, bool)
        if value is not None and isinstance(default, int | float) and name != "early_stopping" and is_wrong:
            raise CheckpointError(f"{path} gives {name} {value!r}, which must be {text}; mend or remove it")
    try:
        GenerationConfig.from_dict(plain)
    except (TypeError, ValueError, LookupError, AttributeError) as error:
        raise CheckpointError(f"{path} cannot be used: {error}; mend the value or remove it") from error


def _check_values(path: Path, plain: dict[str, Any]) -> None:
    """Refuses fields that transformers reads, and that would run code or let weights pass unchecked."""
    for name, value in plain.items():
        # transformers takes "org/name" for a repository of kernels, and imports what it finds there
        if name.endswith(("implementation", "implementation_internal")) and "/" in str(value):
            raise CheckpointError(
                f"{path} asks for code from elsewhere by {name} {value!r}; remove the field, and "
                "pass it as an argument if you trust that code"
            )
    labels, count = plain.get("id2label"), plain.get("num_labels")
    if labels is not None and not (isinstance(labels, dict) and all(re.fullmatch(r"\d{1,9}", key) for key in labels)):
        raise CheckpointError(f"{path} gives id2label {labels!r}, not names by number; remove it")
    if count is not None and not (type(count) is int and 0 <= count <= _LABEL_LIMIT):
        raise CheckpointError(f"{path} gives num_labels {count!r}, which must be a count of at most {_LABEL_LIMIT:,}")
    for name in ("dtype", "torch_dtype"):
        value = plain.get(name)
        held = getattr(torch, value, None) if isinstance(value, str) else None
        if value is not None and not (isinstance(held, torch.dtype) and held.is_floating_point):
            raise CheckpointError(f"{path} gives {name} {value!r}; write 'float32', 'bfloat16' or 'float16'")
    if plain.get("quantization_config") is not None:
        _check_quantisation(path, plain["quantization_config"])


def _check_quantisation(path: Path, quantisation: Any) -> None:
    """Refuses what transformers cannot read as a quantisation."""
    from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AutoQuantizationConfig

    method = quantisation.get("quant_method") if isinstance(quantisation, dict) else quantisation
    known = ("bitsandbytes", *AUTO_QUANTIZATION_CONFIG_MAPPING)
    if not isinstance(method, str) or not isinstance(quantisation, dict) or method not in known:
        raise CheckpointError(f"{path} was quantised by {method!r}, which transformers does not know; remove the field")
    if method == "bitsandbytes" and not (quantisation.get("load_in_8bit") or quantisation.get("load_in_4bit")):
        raise CheckpointError(
            f"{path} gives quantization_config {quantisation!r}, which says neither load_in_8bit nor load_in_4bit; "
            "fetch or save it again"
        )
    try:
        AutoQuantizationConfig.from_dict(copy.deepcopy(quantisation))
    except ImportError as error:
        raise CheckpointError(f"{path} was quantised by {method!r}, which needs a package: {error}") from error
    except (TypeError, ValueError, LookupError, AttributeError, AssertionError) as error:
        raise CheckpointError(
            f"{path} gives quantization_config {quantisation!r}, which cannot be used: {error!r}; fetch or save it "
            "again"
        ) from error


def check_weights(folder: Path, *, variant: str | None = None, outline: bool = False) -> dict[str, Entry]:
    """Refuses a folder whose weights are missing or malformed, or would be looked for outside of it.

    Args:
        folder: of the checkpoint.
        variant: of the weights.
        outline: as for :func:`~omnimoe.checkpoint.header.read_header`.

    Returns:
        The weights by name, as their headers declare them; of files that each rank of a run wrote, all parts of a
        weight under one name.
    """
    index = read_index(folder, variant=variant)
    own = _named("model.safetensors", variant)
    local = sorted(path.name for path in folder.iterdir() if _RANK_LOCAL.fullmatch(path.name))
    if (folder / ".metadata").exists():
        raise CheckpointError(
            f"{folder} is a distributed checkpoint of PyTorch, whose .metadata can run code; resume the run that wrote "
            "it, and save its model with save_pretrained"
        )
    found: dict[str, Entry] = {}
    if index is not None and (folder / own).exists():
        raise CheckpointError(
            f"{folder} holds both {own} and {_index_name(variant)}, of which one is left from an earlier save; "
            "remove the older"
        )
    if index is not None:
        for shard in sorted(set(index.values())):
            keys = [key for key, file in index.items() if file == shard]
            held = check_shard(folder, shard, keys, outline=outline)
            twice = sorted(set(held) & set(found))
            if twice:
                raise CheckpointError(f"{folder / shard} holds {twice[0]}, and so does a shard before it; save again")
            found |= held
    elif (folder / own).exists():
        found = read_header(inside(folder, own), outline=outline)
    elif local:
        for name in local:
            found |= read_header(inside(folder, name))
    else:
        other = sorted(file.name for file in folder.iterdir() if file.suffix in PICKLES)
        what = f"only {', '.join(other)}, which can run code" if other else "no weights"
        raise CheckpointError(f"{folder} has no {own}, {what}; write it with save_pretrained")
    return found


def files_read(folder: Path, *, variant: str | None = None, from_pickle: bool = False) -> set[str]:
    """Names of the files that loading a model reads; some may not be there.

    Args:
        folder: of the checkpoint.
        variant: of the weights.
        from_pickle: the weights are those of transformers' own pickle.
    """
    found = {"config.json", "generation_config.json"}
    if from_pickle:
        path = folder / "pytorch_model.bin.index.json"
        return found | {"pytorch_model.bin", path.name, *(weight_map(path, "bin").values() if path.exists() else ())}
    index = read_index(folder, variant=variant)
    local = (path.name for path in folder.iterdir() if _RANK_LOCAL.fullmatch(path.name))
    return found | {_named("model.safetensors", variant), _index_name(variant), *(index or {}).values(), *local}


def is_of_ranks(folder: Path) -> bool:
    """Whether each rank of a run wrote its own part of the weights, which transformers puts together."""
    return any(_RANK_LOCAL.fullmatch(path.name) for path in folder.iterdir())


def check_shard(folder: Path, shard: str, keys: list[str], *, outline: bool = False) -> dict[str, Entry]:
    """Refuses a shard that is missing or malformed, or does not hold what the index says.

    Args:
        folder: of the checkpoint.
        shard: name of the file.
        keys: the weights that the index looks for in it.
        outline: as for :func:`~omnimoe.checkpoint.header.read_header`.

    Returns:
        These weights.
    """
    if not (folder / shard).exists():
        raise CheckpointError(f"{folder / shard} is missing; it holds {parts_of(keys)}. Fetch or copy it again")
    try:
        found = read_header(inside(folder, shard), outline=outline)
    except CheckpointError as error:
        raise CheckpointError(f"{error}. It holds {parts_of(keys)}" if keys else str(error)) from error
    absent = sorted(set(keys) - set(found))
    if absent:
        raise CheckpointError(
            f"{folder / shard} has no {absent[0]}, where the index looks for {parts_of(absent)}; the two are not of "
            "one save: fetch or save the model again"
        )
    return found


def read_index(folder: Path, *, variant: str | None = None) -> dict[str, str] | None:
    """The file of each weight; None where the folder has no index.

    Raises:
        CheckpointError: if the index is malformed, or names a file that is not right in the folder.
    """
    path = folder / _index_name(variant)
    if not path.exists():
        return None
    return weight_map(path, "safetensors")


def inside(folder: Path, name: str) -> Path:
    """A file of the folder, which must lie in it; the Hub's cache may keep it beside, where it keeps all of them.

    Raises:
        CheckpointError: if it is no file, or a link that leads out.
    """
    path = folder / name
    try:
        real, root = path.resolve(strict=True), folder.resolve()
    except (OSError, RuntimeError) as error:
        raise CheckpointError(f"{path} is a link that leads nowhere: {error}") from error
    repository = next((held.parent for held in (root, *root.parents) if held.name == "snapshots"), None)
    is_cached = repository is not None and real.parent == repository / "blobs"
    if not real.is_relative_to(root) and not is_cached:
        raise CheckpointError(
            f"{path} is a link out of its folder, to {real}, by which a checkpoint from somebody else would read your "
            "files; if you made the link, put the file itself in its place"
        )
    if not real.is_file():
        raise CheckpointError(f"{path} is no regular file; put the file itself in its place")
    return path


def weight_map(path: Path, suffix: str) -> dict[str, str]:
    """The file of each weight by an index whose files end in ``suffix``."""
    plain = read_json(inside(path.parent, path.name), CheckpointError)
    shards = plain.get("weight_map")
    if not isinstance(shards, dict) or not shards or not all(isinstance(shard, str) for shard in shards.values()):
        raise CheckpointError(f"{path} has no weight_map from keys to file names; save or fetch the model again")
    if not isinstance(plain.get("metadata", {}), dict):
        raise CheckpointError(
            f"{path} has metadata {plain['metadata']!r}, not an object; save or fetch the model again"
        )
    for shard in sorted(set(shards.values())):
        if not re.fullmatch(rf"[\w\-][\w.\-]*\.{suffix}", shard, re.ASCII):
            raise CheckpointError(f"{path} names {shard!r}; a shard is a .{suffix} file in the same folder")
    return shards


def parts_of(keys: Iterable[str]) -> str:
    """Weights in words: how many, and of which layers.

    Example:
        >>> parts_of(["model.backbone.layers.0.norm.weight", "model.backbone.layers.1.norm.weight", "lm_head.weight"])
        '3 weights: layers 0 to 1, lm_head'
    """
    keys = list(keys)
    layers = sorted({int(number) for key in keys for number in re.findall(r"\.layers\.(\d{1,9})\.", f".{key}")})
    others = sorted({key.removeprefix("model.").partition(".")[0] for key in keys if not re.search(r"\blayers\.", key)})
    runs = runs_of(layers)
    named = ["layers " + ", ".join(" to ".join(map(str, run)) for run in runs)] if runs else []
    counted = "1 weight" if len(keys) == 1 else f"{len(keys)} weights"
    return f"{counted}: {', '.join([*named, *others[:10]])}"


def _named(name: str, variant: str | None) -> str:
    """transformers puts a variant before the last part of a name."""
    if variant is None:
        return name
    if not re.fullmatch(r"\w[\w.\-]*", variant, re.ASCII):
        raise CheckpointError(f"variant {variant!r} must be a part of a file name, such as 'bf16'")
    stem, _, suffix = name.rpartition(".")
    return f"{stem}.{variant}.{suffix}"


def _index_name(variant: str | None) -> str:
    return _named("model.safetensors.index.json", variant)

"""Which part of each stored weight a model of some towers needs, and the reading of that part alone."""

from __future__ import annotations

import copy
import functools
from dataclasses import dataclass
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from omnimoe.checkpoint import CheckpointError
from omnimoe.checkpoint.errors import MisfitError
from omnimoe.checkpoint.finite import check_choice
from omnimoe.checkpoint.finite import check_finite as look_for_nan
from omnimoe.checkpoint.fit import bytes_of, check_dtypes, misfits
from omnimoe.checkpoint.folder import check_shard, inside, read_index
from omnimoe.checkpoint.header import Entry, read_header
from omnimoe.checkpoint.manifest import verify_folder
from omnimoe.checkpoint.memory import check_memory
from omnimoe.config import ConfigError
from omnimoe.experts import FeedForward, RoutedExperts, RoutedProjections
from omnimoe.layers import BankMLP, ExpertLinear
from omnimoe.layers.bank import Bank
from omnimoe.layers.uneven import Uneven
from omnimoe.model import OmniMoeForCausalLM
from omnimoe.routers import ByModalityRouter, Router, SoftRouter, StaticRouter
from omnimoe.routers.balance import BalancedRouter
from omnimoe.towers.selection import Selection

Index = tuple[int, ...] | None
"""What is taken of a weight's leading axis; None for all of it."""


@functools.singledispatch
def kept_copies(module: nn.Module, keys: tuple[int, ...]) -> dict[str, Index]:
    """Which copies of its banks stay, by the path of a bank or a weight inside of the module.

    Where a part of yours has banks over something else than keys, register: ``@kept_copies.register(MyExperts)``.
    """
    return {}


@kept_copies.register
def _(module: Bank, keys: tuple[int, ...]) -> dict[str, Index]:
    return {"": tuple(sorted({module.towers[key] for key in keys}))}


@kept_copies.register
def _(module: BankMLP, keys: tuple[int, ...]) -> dict[str, Index]:
    return {}  # its owner knows what its copies are over


@kept_copies.register
def _(module: FeedForward, keys: tuple[int, ...]) -> dict[str, Index]:
    met = sorted({module.towers[key] for key in keys})
    if isinstance(module.experts, Uneven):
        return {f"experts.copies.{copy}": (0,) for copy in met}
    return {"experts": tuple(met)}


@kept_copies.register
def _(module: RoutedExperts, keys: tuple[int, ...]) -> dict[str, Index]:
    kept = _kept_experts(module.router, keys)
    if not module.config.pools or kept is None:
        return {"experts": kept}
    found: dict[str, Index] = {}
    for pool, (first, stop) in enumerate(pairwise(accumulate((count for count, _ in module.config.pools), initial=0))):
        found[f"experts.pools.{pool}"] = tuple(expert - first for expert in kept if first <= expert < stop)
    return found


@kept_copies.register
def _(module: RoutedProjections, keys: tuple[int, ...]) -> dict[str, Index]:
    kept, first = _kept_experts(module.router, keys), module.num_experts
    if kept is not None:
        kept += tuple(range(first, first + module.declared.num_shared_experts))  # which every row meets
    return dict.fromkeys(module.declared.experts_at, kept)


@kept_copies.register
def _(module: ExpertLinear, keys: tuple[int, ...]) -> dict[str, Index]:
    return {}  # its owner knows what its copies are over


@kept_copies.register
def _(module: SoftRouter, keys: tuple[int, ...]) -> dict[str, Index]:
    return {"slots": _kept_experts(module, keys)}


@kept_copies.register
def _(module: BalancedRouter, keys: tuple[int, ...]) -> dict[str, Index]:
    return {"expert_bias": keys} if module.config.expert_bias == "key" else {}


def _kept_experts(router: Router, keys: tuple[int, ...]) -> Index:
    if isinstance(router, ByModalityRouter | SoftRouter) and router.config.experts:
        spans = list(pairwise(accumulate(router.config.experts, initial=0)))
        return tuple(expert for key in keys for expert in range(*spans[key]))
    if isinstance(router, StaticRouter):
        return tuple(sorted({expert for key in keys for expert in router.experts_of_keys[key] if expert >= 0}))
    return None


@dataclass(frozen=True)
class Piece:
    """Where a weight of the smaller model comes from.

    Args:
        key: of the whole model.
        shape: of that weight.
        index: what is taken of its leading axis.
    """

    key: str
    shape: tuple[int, ...]
    index: Index


def pieces(selection: Selection) -> dict[str, Piece]:
    """Where each weight of the smaller model comes from, by its name.

    Raises:
        ConfigError: if a part does not say how it is cut.
    """
    whole, small = _built(selection)
    found, renamed = _indices(whole, selection), _renamed(whole, selection.keys)
    held = whole.state_dict()
    plan: dict[str, Piece] = {}
    for name, tensor in small.state_dict().items():
        key = next((old + name[len(new) :] for new, old in renamed.items() if name.startswith(new)), name)
        index = found.get(key)
        shape = tuple(held[key].shape) if key in held else ()
        cut = (len(index), *shape[1:]) if shape and index is not None else shape
        if cut != tuple(tensor.shape):
            raise ConfigError(
                f"{name} is to be {tuple(tensor.shape)} without what is left out, and {cut} of it stay: its part does "
                "not say how it is cut; register that with omnimoe.towers.kept_copies, or load the whole model"
            )
        plan[name] = Piece(key, shape, index if index != tuple(range(shape[0] if shape else 0)) else None)
    return plan


def _built(selection: Selection) -> tuple[OmniMoeForCausalLM, OmniMoeForCausalLM]:
    """The whole model and the smaller one, without memory."""
    cut = selection.config
    with torch.device("meta"):
        return OmniMoeForCausalLM(copy.deepcopy(selection.whole)), OmniMoeForCausalLM(copy.deepcopy(cut))


def _indices(whole: OmniMoeForCausalLM, selection: Selection) -> dict[str, Index]:
    found: dict[str, Index] = {}
    for path, module in whole.named_modules():
        own = [name for name, _ in (*module.named_parameters(), *module.named_buffers())]
        for inner, copies in kept_copies(module, selection.keys).items():
            start = f"{inner}." if inner else ""
            found |= {f"{path}.{name}": copies for name in own if name == inner or name.startswith(start)}
    rows = tuple(range(selection.vocab_size))
    found |= dict.fromkeys(("model.embed_tokens.weight", "lm_head.weight", "lm_head.bias"), rows)
    spans = list(pairwise(accumulate(whole.config.learned_positions, initial=0)))
    places = tuple(row for number in selection.modalities if spans for row in range(*spans[number]))
    by_modality = dict.fromkeys(("aligned.weight", "aligned.bias", "model.kinds.weight"), selection.modalities)
    return found | by_modality | {"model.places.weight": places}


def _renamed(whole: OmniMoeForCausalLM, keys: tuple[int, ...]) -> dict[str, str]:
    """Prefixes of names in the smaller model, and what they are in the whole one."""
    found: dict[str, str] = {}
    for path, module in whole.named_modules():
        if isinstance(module, ByModalityRouter):
            found |= {f"{path}.routers.{new}.": f"{path}.routers.{old}." for new, old in enumerate(keys)}
        elif isinstance(module, RoutedExperts) and module.config.pools:
            pools = [pool for pool, copies in kept_copies(module, keys).items() if copies != ()]
            found |= {f"{path}.experts.pools.{new}.": f"{path}.{old}." for new, old in enumerate(pools)}
    return found


def load_pieces(
    folder: Path,
    selection: Selection,
    plan: dict[str, Piece],
    *,
    strict: bool,
    verify: bool,
    check_finite: str,
    check_size: bool,
    **given: Any,
) -> tuple[OmniMoeForCausalLM, dict[str, Any]]:
    """The smaller model; of a bank no copy is read that is left out.

    Args:
        folder: of the checkpoint.
        selection: what is kept.
        plan: where each weight comes from.
        strict: as for :func:`omnimoe.from_pretrained`, and so the next three.
        verify: with it the files that are read are read whole.
        check_finite: the weights that are kept.
        check_size: of the smaller model.
        given: arguments of transformers.

    Returns:
        The model, and transformers' report of what does not fit.

    Raises:
        CheckpointError: if a file that is read is missing, malformed, or does not fit.
    """
    check_choice(check_finite)
    index = read_index(folder)
    wanted = {piece.key for piece in plan.values()}
    files = sorted({"model.safetensors"} if index is None else {index[key] for key in wanted & index.keys()})
    if verify:
        verify_folder(folder, {"config.json", *files})
    stored = {key: entry for file in files for key, entry in _entries(folder, file, index).items()}
    whole, small = _built(selection)
    # what the other files hold is known by name alone
    named = stored.keys() if index is None else index.keys()
    unread = {key: Entry("F32", tuple(held.shape), 0) for key, held in whole.state_dict().items() if key not in wanted}
    fits = {**{key: entry for key, entry in unread.items() if key in named}, **stored}
    misfit = misfits(fits, whole.state_dict(), whole.all_tied_weights_keys)
    if strict and misfit:
        raise MisfitError(f"the weights in {folder} do not fit its config.json.\n{misfit}\nstrict=False loads the rest")
    check_dtypes(stored, whole.state_dict())
    if check_size and given.get("device_map") in (None, "cpu"):
        dtype = given.get("dtype")
        check_memory(
            bytes_of(small, dtype if isinstance(dtype, torch.dtype) else selection.config.dtype, {}), str(folder)
        )
    weights = _read(folder, files, plan, stored)
    model, report = OmniMoeForCausalLM.from_pretrained(
        None,
        config=selection.config,
        state_dict=weights,
        output_loading_info=True,
        ignore_mismatched_sizes=True,
        **given,
    )
    look_for_nan(model, check_finite, folder)
    selection.finish(model, folder)
    return model, report


def _read(folder: Path, files: list[str], plan: dict[str, Piece], stored: dict[str, Entry]) -> dict[str, Tensor]:
    weights: dict[str, Tensor] = {}
    for file in files:
        with safe_open(inside(folder, file), framework="pt") as opened:
            keys = set(opened.keys())
            for name, piece in plan.items():
                if piece.key in keys and stored[piece.key].shape == piece.shape:
                    weights[name] = _taken(opened.get_slice(piece.key), piece.index)
    return weights


def _entries(folder: Path, file: str, index: dict[str, str] | None) -> dict[str, Entry]:
    if index is None:
        if not (folder / file).exists():
            raise CheckpointError(f"{folder} has no {file}; write it with save_pretrained")
        return read_header(inside(folder, file))
    return check_shard(folder, file, [key for key, held in index.items() if held == file])


def _taken(stored: Any, index: Index) -> Tensor:
    if index is None:
        return stored[...]
    runs: list[list[int]] = []
    for number in index:
        if runs and runs[-1][1] == number:
            runs[-1][1] += 1
        else:
            runs.append([number, number + 1])
    # not a view, which would hold on to all of the file
    return torch.cat([stored[start:stop] for start, stop in runs])

"""Some towers of a model without the rest: a smaller config, and which part of each stored weight it needs.

Ids never move: the vocabulary is cut behind the last row that something kept uses, and kept modalities stay where they
are. On rows of what is kept, the smaller model gives what the whole one gives.
"""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Iterable
from dataclasses import dataclass, fields
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import GenerationConfig

from omnimoe.checkpoint import CheckpointError
from omnimoe.checkpoint.errors import MisfitError
from omnimoe.checkpoint.finite import check_choice
from omnimoe.checkpoint.finite import check_finite as look_for_nan
from omnimoe.checkpoint.fit import bytes_of, check_dtypes, misfits
from omnimoe.checkpoint.folder import check_shard, inside, read_index
from omnimoe.checkpoint.header import Entry, read_header
from omnimoe.checkpoint.manifest import verify_folder
from omnimoe.checkpoint.memory import check_memory
from omnimoe.config import Config, ConfigError
from omnimoe.experts import FeedForward, RoutedExperts
from omnimoe.layers import BankMLP, TowerMap, resolve_towers
from omnimoe.layers.bank import Bank
from omnimoe.modalities import Tokens
from omnimoe.model import OmniMoeConfig, OmniMoeForCausalLM
from omnimoe.routers import ByModalityRouter, Router, StaticRouter

Index = tuple[int, ...] | None
"""What is taken of a weight's leading axis; None for all of it."""


@dataclass(frozen=True, kw_only=True)
class Selection:
    """What is kept of a model.

    Args:
        whole: config of the whole model.
        keys: ids of the keys that stay, ascending.
        modalities: ids of the modalities that stay, ascending.
    """

    whole: OmniMoeConfig
    keys: tuple[int, ...]
    modalities: tuple[int, ...]

    @functools.cached_property
    def config(self) -> OmniMoeConfig:
        """The config of what is kept."""
        whole, num_keys = self.whole, self.whole.num_keys
        names = whole.modality_names
        kept = {names[number] for number in self.modalities}
        cut = functools.partial(keep_keys, keys=self.keys, num_keys=num_keys)
        is_alone = len(self.keys) == 1
        config = whole.replace(
            modalities=tuple(self._moved(whole.modalities[number]) for number in self.modalities),
            vocab_size=self.vocab_size,
            keys=tuple(whole.keys[key] for key in self.keys) if whole.keys else (),
            bidirectional_modalities=tuple(name for name in whole.bidirectional_modalities if name in kept),
            # a rule that compares keys has no cached decoding, and nothing is left to compare
            mask="causal" if is_alone and whole.mask == "one_way" else whole.mask,
            attention=cut(whole.attention),
            experts=cut(whole.experts),
            norm=cut(whole.norm),
            final_norm=cut(whole.final_norm),
            layers=tuple(cut(held) for held in whole.layers),
        )
        if hasattr(whole, "card"):
            config.card = whole.card
        return config

    @functools.cached_property
    def vocab_size(self) -> int:
        """Rows of the vocabulary up to the last that something kept uses."""
        owned = torch.isin(self.whole.modality_of_ids(), torch.tensor(self.modalities)).nonzero()
        return max((0, *owned.flatten().tolist(), *self._special)) + 1

    @property
    def silent_ids(self) -> list[int]:
        """Ids of what was left out that are still in the vocabulary: a model without it must not open or write it."""
        owners = self.whole.modality_of_ids(markers="text")
        silent = set((~torch.isin(owners, torch.tensor(self.modalities))).nonzero().flatten().tolist())
        left = (held for number, held in enumerate(self.whole.modalities) if number not in self.modalities)
        silent |= {token for held in left for token in (held.begin_id, held.placeholder_id) if token is not None}
        return sorted(token for token in silent - self._special if token < self.vocab_size)

    def finish(self, model: OmniMoeForCausalLM, folder: Path) -> None:
        """Gives the model the settings of generation that lie in its folder, cut likewise."""
        model.config._name_or_path = str(folder)
        if (folder / "generation_config.json").is_file():
            model.generation_config = GenerationConfig.from_pretrained(folder)
        silent = {*self.silent_ids, *(model.generation_config.suppress_tokens or ())}
        if silent:
            model.generation_config.suppress_tokens = sorted(token for token in silent if token < self.vocab_size)

    @functools.cached_property
    def _special(self) -> set[int]:
        whole = self.whole
        ends = whole.eos_token_id if isinstance(whole.eos_token_id, list) else [whole.eos_token_id]
        tokens = [whole.pad_token_id, whole.bos_token_id, *ends]
        for number in self.modalities:
            held = whole.modalities[number]
            tokens += [held.begin_id, held.end_id, held.placeholder_id]
        return {token for token in tokens if token is not None}

    def _moved(self, modality: Any) -> Any:
        """A modality whose ids are where they were, though others before it are gone."""
        if not isinstance(modality, Tokens.Config):
            return modality
        start = self.whole.token_ranges[modality.name].start
        return modality.replace(vocab_start=start, vocab_size=min(modality.vocab_size, self.vocab_size - start))


def select(config: OmniMoeConfig, towers: Iterable[str] | None, without: Iterable[str] = ()) -> Selection | None:
    """What is kept of a model; None where that is all of it.

    Args:
        config: of the whole model.
        towers: names of the keys whose towers stay: the modalities, unless the config has other keys. All where None.
        without: names of modalities or keys that go.

    Raises:
        ConfigError: if a name is unknown, or nothing would be left.
    """
    keys, names = config.keys or config.modality_names, config.modality_names
    towers = keys if towers is None else _listed(towers)
    without = _listed(without)
    for given, known, kind in ((towers, keys, "towers"), (without, {*keys, *names}, "without")):
        unknown = sorted(set(given) - set(known))
        if unknown:
            raise ConfigError(
                f"{kind} names {', '.join(map(repr, unknown))}; this model has {', '.join(sorted(known))}"
            )
    kept_keys = tuple(number for number, name in enumerate(keys) if name in towers and name not in without)
    kept = tuple(number for number, name in enumerate(names) if name not in without)
    if not config.keys:
        kept = kept_keys
    if not kept_keys or not kept:
        raise ConfigError(f"nothing is left of a model of {', '.join(keys)} with towers {towers} and without {without}")
    if len(kept_keys) == len(keys) and len(kept) == len(names):
        return None
    return Selection(whole=config, keys=kept_keys, modalities=kept)


def _listed(names: Iterable[str]) -> tuple[str, ...]:
    return (names,) if isinstance(names, str) else tuple(names)


@functools.singledispatch
def keep_keys(part: Any, *, keys: tuple[int, ...], num_keys: int) -> Any:
    """The config of a part for a model that has some of its keys alone.

    Fields that are annotated as tower maps are cut, in configs inside of it too. Where a part of yours has other fields
    over keys, register what becomes of them: ``@keep_keys.register(MyExperts.Config)``.

    Args:
        part: config of any part.
        keys: ids of the keys that stay, ascending.
        num_keys: keys of the whole model.
    """
    if isinstance(part, tuple | list):
        return tuple(keep_keys(held, keys=keys, num_keys=num_keys) for held in part)
    if not isinstance(part, Config):
        return part
    changes: dict[str, Any] = {}
    for field in fields(part):
        value, hint = getattr(part, field.name), _annotation(type(part), field.name)
        if hint == "TowerMap":
            changes[field.name] = _cut_map(value, keys, num_keys)
        elif hint == "dict[str, TowerMap]":
            changes[field.name] = {site: _cut_map(towers, keys, num_keys) for site, towers in value.items()}
        elif isinstance(value, Config | tuple | list):
            changes[field.name] = keep_keys(value, keys=keys, num_keys=num_keys)
    return part.replace(**changes)


@keep_keys.register
def _(part: RoutedExperts.Config, *, keys: tuple[int, ...], num_keys: int) -> Any:
    cut = keep_keys.dispatch(Config)(part, keys=keys, num_keys=num_keys)
    router = part.router
    if isinstance(router, ByModalityRouter.Config):
        return cut.replace(num_experts=sum(router.experts[key] for key in keys))
    if isinstance(router, StaticRouter.Config):
        return cut.replace(num_experts=len({_expert_of(router, key) for key in keys}))
    return cut


@keep_keys.register
def _(part: ByModalityRouter.Config, *, keys: tuple[int, ...], num_keys: int) -> Any:
    return part.replace(experts=tuple(part.experts[key] for key in keys))


@keep_keys.register
def _(part: StaticRouter.Config, *, keys: tuple[int, ...], num_keys: int) -> Any:
    chosen = [_expert_of(part, key) for key in keys]
    return part.replace(experts_of_keys=tuple(sorted(set(chosen)).index(expert) for expert in chosen))


def _expert_of(router: Any, key: int) -> int:
    return router.experts_of_keys[key] if router.experts_of_keys else key


def _annotation(cls: type, name: str) -> Any:
    hints = (inspect.get_annotations(base).get(name) for base in cls.__mro__)
    hint = next((found for found in hints if found is not None), None)
    return "TowerMap" if hint == TowerMap else hint


def _cut_map(towers: TowerMap, keys: tuple[int, ...], num_keys: int) -> TowerMap:
    copies = resolve_towers(towers, num_keys)
    chosen = [copies[key] for key in keys]
    order = sorted(set(chosen))
    if len(order) == 1:
        return "shared"
    cut = tuple(order.index(copy) for copy in chosen)
    return "modality" if cut == tuple(range(len(keys))) else cut


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
    return {"experts": tuple(sorted({module.towers[key] for key in keys}))}


@kept_copies.register
def _(module: RoutedExperts, keys: tuple[int, ...]) -> dict[str, Index]:
    return {"experts": _kept_experts(module.router, keys)}


def _kept_experts(router: Router, keys: tuple[int, ...]) -> Index:
    if isinstance(router, ByModalityRouter):
        spans = list(pairwise(accumulate(router.config.experts, initial=0)))
        return tuple(expert for key in keys for expert in range(*spans[key]))
    if isinstance(router, StaticRouter):
        return tuple(sorted({_expert_of(router, key) for key in keys}))
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
    return found | {"model.embed_tokens.weight": rows, "lm_head.weight": rows}


def _renamed(whole: OmniMoeForCausalLM, keys: tuple[int, ...]) -> dict[str, str]:
    """Prefixes of names in the smaller model, and what they are in the whole one."""
    found: dict[str, str] = {}
    for path, module in whole.named_modules():
        if isinstance(module, ByModalityRouter):
            found |= {f"{path}.routers.{new}.": f"{path}.routers.{old}." for new, old in enumerate(keys)}
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
    misfit = misfits(fits, whole, whole.all_tied_weights_keys)
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
    parts = [stored[start:stop] for start, stop in runs]
    return parts[0] if len(parts) == 1 else torch.cat(parts)

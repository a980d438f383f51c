"""What a caller passes to the model: checks that name the value and the remedy, and what is derived from it.

Shapes and dtypes are checked everywhere. Values are read only on the CPU, where reading costs nothing; on an
accelerator a wrong id would cost a synchronisation to find, so check batches before they are moved. A graph that is
being traced reads none.
"""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Iterable, Mapping
from numbers import Integral
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.utils import logging

from omnimoe.layers.masks import generates_under
from omnimoe.model_config import OmniMoeConfig
from omnimoe.routers import AuxiliaryRouter, ExpertChoiceRouter

logger = logging.get_logger(__name__)


class InputError(ValueError):
    """An input of the wrong shape, dtype or range."""


_PASSED_BY_TRANSFORMERS = frozenset({"cache_position", "return_dict", "num_items_in_batch"})
"""What generation, the Trainer and PEFT pass to any model; nothing here depends on it."""


def is_readable(tensor: Tensor) -> bool:
    """Whether values may be read: on the CPU, and not while a graph is traced."""
    return tensor.device.type == "cpu" and not torch.compiler.is_compiling()


def check_tensor(name: str, given: object, form: str | Callable[[], str]) -> None:
    """Refuses lists, arrays and the like.

    Args:
        name: the argument's name.
        given: what was passed; None is fine.
        form: the shape it must have, for the message. A function where it holds sizes, for to write down a size of a
            graph that is being traced would fix it.

    Raises:
        InputError: with the type found.
    """
    if given is not None and not isinstance(given, Tensor):
        form = form if isinstance(form, str) else form()
        raise InputError(f"{name} must be a tensor {form}, got {type(given).__name__}; pass torch.as_tensor({name})")


def check_whole(name: str, given: object, *, least: int = 1, error: type[ValueError] = InputError) -> None:
    """Refuses what is no whole number, or a smaller one.

    Args:
        name: the argument's name.
        given: what was passed.
        least: the smallest that will do.
        error: what to raise.

    Raises:
        InputError: with the value, or ``error`` in its place.
    """
    if isinstance(given, bool) or not isinstance(given, Integral):
        raise error(f"{name} must be a whole number, got {given!r}")
    if given < least:
        raise error(f"{name} must be at least {least}, got {given}")


def check_arguments(unknown: Iterable[str], forward: Callable) -> None:
    """Refuses arguments that nothing would read.

    Args:
        unknown: names of the keyword arguments that are no parameters of ``forward``.
        forward: the method they were passed to.

    Raises:
        InputError: with the nearest argument.
    """
    for name in sorted(set(unknown) - _PASSED_BY_TRANSFORMERS):
        kinds = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
        known = [key for key, held in inspect.signature(forward).parameters.items() if held.kind not in kinds]
        near = difflib.get_close_matches(name, known, n=1)
        meant = f"did you mean {near[0]!r}?" if near else f"the arguments are {', '.join(known)}"
        raise InputError(f"the model takes no argument {name!r}; {meant}")


def check_ids(name: str, ids: Tensor | None, shape: tuple[int, int], low: int, high: int, remedy: str) -> None:
    """Refuses ids of another shape or dtype, or outside ``[low, high)``.

    Args:
        name: the argument's name.
        ids: what was passed; None is fine.
        shape: ``(B, T)`` it must have.
        low: smallest id allowed.
        high: one past the largest.
        remedy: what to do about an id out of range.

    Raises:
        InputError: with the value found.
    """
    if ids is None:
        return
    if not isinstance(ids, Tensor):
        raise InputError(f"{name} must be an integer tensor of shape {shape}, got {type(ids).__name__}")
    if tuple(ids.shape) != shape:
        raise InputError(f"{name} must have shape {shape}, as input_ids, got {tuple(ids.shape)}")
    if ids.dtype not in (torch.int64, torch.int32):
        raise InputError(f"{name} must be int64, got {ids.dtype}; convert it with .long()")
    if is_readable(ids) and ids.numel():
        least, most = (int(found) for found in ids.aminmax())
        if least < low or most >= high:
            wrong = least if least < low else most
            raise InputError(f"{name} holds {wrong}, outside [{low}, {high}); {remedy}")


def check_batch(
    config: OmniMoeConfig,
    input_ids: Tensor | None,
    inputs_embeds: Tensor | None,
    modality_ids: Tensor | None,
    key_ids: Tensor | None,
    segment_ids: Tensor | None,
) -> tuple[int, int]:
    """Checks the main inputs against each other.

    Returns:
        B and T.

    Raises:
        InputError: if they do not fit.
    """
    given = input_ids if input_ids is not None else inputs_embeds
    if given is None or (input_ids is not None and inputs_embeds is not None):
        raise InputError("pass exactly one of input_ids and inputs_embeds")
    check_tensor("input_ids", input_ids, "(B, T)")
    check_tensor("inputs_embeds", inputs_embeds, f"(B, T, {config.hidden_size})")
    wanted = 2 if input_ids is not None else 3
    if given.ndim != wanted:
        form = "(B, T)" if wanted == 2 else "(B, T, D)"
        raise InputError(f"{'input_ids' if wanted == 2 else 'inputs_embeds'} must be {form}, got {tuple(given.shape)}")
    if wanted == 3 and given.shape[2] != config.hidden_size:
        raise InputError(f"inputs_embeds must be (B, T, {config.hidden_size}), got {tuple(given.shape)}")
    shape = (given.shape[0], given.shape[1])
    if shape[1] == 0:
        raise InputError(f"the sequence is empty: input_ids have shape {shape}; pass at least one token")
    names = ", ".join(f"{i} {name}" for i, name in enumerate(config.modality_names))
    check_ids("input_ids", input_ids, shape, 0, config.vocab_size, f"the vocabulary has {config.vocab_size} rows")
    check_ids("modality_ids", modality_ids, shape, 0, len(config.modalities), f"the modalities are {names}")
    keys = ", ".join(config.keys) or names
    check_ids("key_ids", key_ids, shape, 0, config.num_keys, f"the keys are {keys}")
    check_ids("segment_ids", segment_ids, shape, -1, 2**31, "number documents from 0, padding is -1")
    return shape


def check_rows(name: str, given: object, *, free: Iterable[str] = ()) -> None:
    """Refuses rows of continuous modalities that do not come by name, ``{modality: tensor}``; None is fine.

    Args:
        name: the argument's name.
        given: what was passed.
        free: modalities whose rows may come in another form.

    Raises:
        InputError: with the type found.
    """
    if given is not None and not isinstance(given, Mapping):
        raise InputError(f"{name} must be a mapping, {{modality: tensor (n, C)}}, got {type(given).__name__}")
    for key, rows in (given or {}).items():
        if key in free:
            continue
        check_tensor(f"{name}[{key!r}]", rows, "(n, C)" if name != "timesteps" else "(n,)")


def check_features(
    config: OmniMoeConfig, name: str, rows: Tensor, expected: int, timesteps: Tensor | None = None
) -> None:
    """Refuses features of an unknown or discrete modality, or of another shape than the sequence has places for.

    Raises:
        InputError: with the shapes.
    """
    known = [modality.name for modality in config.modalities if not modality.is_discrete]
    if name not in known:
        raise InputError(f"features for {name!r}, but the continuous modalities are {known or 'none'}")
    if rows.ndim != 2 or rows.shape[0] != expected:
        raise InputError(
            f"features[{name!r}] must be (n, C) with one row for each of the {expected} positions whose modality is "
            f"{name!r}, got {tuple(rows.shape)}"
        )
    channels = getattr(config.modalities[config.modality_names.index(name)], "channels", rows.shape[1])
    if rows.shape[1] != channels:
        raise InputError(f"features[{name!r}] must be ({expected}, {channels}), got {tuple(rows.shape)}")
    if timesteps is not None and tuple(timesteps.shape) != (expected,):
        raise InputError(f"timesteps[{name!r}] must be ({expected},), got {tuple(timesteps.shape)}; one for each row")


def repeated(name: str, rows: Any, counts: list[int], times: int) -> Any:
    """What goes with a batch each of whose sequences stands there several times, one after the other.

    Args:
        name: the argument's name.
        rows: ``(n, ...)``, in order of the batch; of a batch of one also a list of whatever.
        counts: how many rows each sequence has, of n.
        times: how often a sequence is repeated.

    Returns:
        ``(n * times, ...)``.

    Raises:
        InputError: if it is not known which rows are whose.
    """
    if len(counts) == 1 and isinstance(rows, Tensor):
        return rows.repeat(times, *(1,) * (rows.ndim - 1))
    if len(counts) == 1 and isinstance(rows, list | tuple):
        return list(rows) * times
    if isinstance(rows, Tensor) and len(rows) == sum(counts):
        return torch.cat([part for part in rows.split(counts) for _ in range(times)])
    raise InputError(
        f"{name} cannot be repeated for {times} sequences a prompt, since it does not show which part belongs to which "
        f"of the {len(counts)} prompts; generate from one prompt at a time"
    )


def check_embedded(name: str, embedded: Tensor, expected: int) -> None:
    """Refuses features of an input-only modality that become more or fewer rows than the sequence has places for.

    Raises:
        InputError: with both counts.
    """
    if len(embedded) != expected:
        raise InputError(
            f"features[{name!r}] become {len(embedded)} rows, and the sequence has {expected} positions whose modality "
            f"is {name!r}; lay them out with span_ids(features) of that modality"
        )


def valid_positions(
    attention_mask: Tensor | None,
    segment_ids: Tensor | None,
    batch_size: int,
    past: int | Tensor,
    length: int,
    *,
    is_cached: bool = True,
) -> Tensor | None:
    """``(B, past + T)`` bool, or None where nothing is padding.

    With a cache of fixed size a mask may be as long as the cache; without any it has the length of the input.
    """
    valid = None if segment_ids is None or isinstance(past, Tensor) or past else segment_ids >= 0
    if attention_mask is not None:
        valid = _checked(attention_mask, batch_size, past, length, is_cached) & (True if valid is None else valid)
    if valid is None or (is_readable(valid) and bool(valid.all())):
        return None
    return valid


def newest(valid: Tensor, past: int | Tensor, length: int) -> Tensor:
    """``(B, T)``, the entries of the new positions of ``(B, past + T)``."""
    if isinstance(past, int):
        return valid[:, past:]
    return valid.index_select(1, past + torch.arange(length, device=valid.device))


def _checked(attention_mask: Tensor, batch_size: int, past: int | Tensor, length: int, is_cached: bool) -> Tensor:
    if isinstance(past, Tensor):
        return attention_mask.bool()
    check_tensor("attention_mask", attention_mask, lambda: f"({batch_size}, {past + length})")
    fits = attention_mask.ndim == 2 and attention_mask.shape[0] == batch_size
    if not fits or attention_mask.shape[1] < past + length or (attention_mask.shape[1] > length and not is_cached):
        raise InputError(
            f"attention_mask must be ({batch_size}, {past + length}), one entry for each cached and each new position, "
            f"got {tuple(attention_mask.shape)}"
        )
    return attention_mask[:, : past + length].bool()


def rotary_positions(
    position_ids: Tensor | None,
    segment_ids: Tensor | None,
    batch_size: int,
    past: int | Tensor,
    length: int,
    device: torch.device,
) -> Tensor:
    """``(B, T, A)`` rotary positions."""
    if position_ids is not None:
        _check_positions(position_ids, batch_size, length)
        position_ids = position_ids if position_ids.ndim == 3 else position_ids.unsqueeze(-1)
        return position_ids.expand(batch_size, -1, -1)
    time = (past + torch.arange(length, device=device)).expand(batch_size, -1)
    if segment_ids is not None:
        starts = F.pad(segment_ids[:, 1:] != segment_ids[:, :-1], (1, 0), value=True)
        time = time - torch.where(starts, time, 0).cummax(dim=1).values
    return time.unsqueeze(-1)


def _check_positions(position_ids: Tensor, batch_size: int, length: int) -> None:
    def form() -> str:
        return f"({batch_size}, {length}) or ({batch_size}, {length}, axes)"

    check_tensor("position_ids", position_ids, form)
    shape = tuple(position_ids.shape)
    if len(shape) not in (2, 3) or shape[0] not in (1, batch_size) or shape[1] != length:
        raise InputError(f"position_ids must be {form()}, got {shape}")
    if position_ids.dtype not in (torch.int64, torch.int32, torch.float32):
        raise InputError(
            f"position_ids must be int64, or float32 for places between whole numbers, got {position_ids.dtype}; "
            "convert it with .long()"
        )
    if is_readable(position_ids) and position_ids.numel() and int(position_ids.min()) < 0:
        raise InputError(f"position_ids holds {int(position_ids.min())}; positions count from 0, padding may have any")


def check_generates(config: OmniMoeConfig) -> None:
    """Refuses to generate where what was generated would change by what follows: by the mask, or by the routers.

    Raises:
        InputError: with the rule, or the layers and the router, and what to do.
    """
    if not generates_under(config.mask):
        raise InputError(
            f"under the mask rule {config.mask!r} a token depends on later ones, so the model does not generate; take "
            "'causal', or register the rule with is_causal=True or blocks_only_add=True if that is what it is"
        )
    stuck = [layer for layer, block in enumerate(config.blocks) if not block.has_causal_form]
    if stuck:
        block = config.blocks[stuck[0]]
        routed = next((part for part in (block.attention, block.experts) if not part.has_causal_form), None)
        if block.depth is not None and block.depth.has_causal_form and routed is None:
            raise InputError(
                f"{block.attention.target.__name__} in layers {', '.join(map(str, stuck))} stands in a mixture of "
                "depths, and its cache has no place for rows that a layer leaves out, so the model does not generate; "
                "take Attention there, or all rows"
            )
        part: Any = block.depth if routed is None else getattr(routed, "router", routed)
        raise InputError(
            f"{part.target.__name__} in layers {', '.join(map(str, stuck))} routes a row by looking at others, later "
            "ones too, so the model does not generate; give expert choice and depth causal_form='auxiliary' and train "
            f"that, as {AUXILIARY_STAGE} does, or take a causal router such as TopKRouter, and all rows in every layer"
        )


AUXILIARY_STAGE = "omnimoe train --from RUN --stage auxiliary --out OUT"
"""What gives a trained model auxiliary routers."""


def check_routers(model: nn.Module) -> None:
    """Refuses to generate by auxiliary routers that were never trained and by cut-offs that never moved.

    Where only some of a layer did not, as those of a modality that training never showed, it points them out.

    Raises:
        InputError: with their layers and what to do.
    """
    untrained: set[str] = set()
    by_cutoff: dict[str, list[ExpertChoiceRouter]] = {}
    for path, module in model.named_modules():
        layer = path.partition(".layers.")[2].partition(".")[0]
        if isinstance(module, AuxiliaryRouter) and not module.is_trained:
            untrained.add(layer)
        elif isinstance(module, ExpertChoiceRouter) and module.config.causal_form == "cutoff":
            by_cutoff.setdefault(layer, []).append(module)
    if untrained:
        raise InputError(
            f"auxiliary routers of layers {_numbers(untrained)} were never trained, so what takes a token is unknown, "
            f"and the model does not generate; train them with {AUXILIARY_STAGE}, or in a loop of your own with "
            "omnimoe.hold_all_but_auxiliary(model)"
        )
    moved = {layer: [_has_moved(router) for router in routers] for layer, routers in by_cutoff.items()}
    unset = {layer for layer, routers in by_cutoff.items() if not (any(moved[layer]) or routers[0].config.is_causal)}
    if unset:
        raise InputError(
            f"the running cut-offs of expert choice in layers {_numbers(unset)} never moved, so what takes a token is "
            "unknown, and the model does not generate; call model.update_routers(out.routings) after each step of "
            "training, on its data for a model that was trained without, or give it auxiliary routers with "
            f"{AUXILIARY_STAGE}"
        )
    left = {layer for layer in moved if not all(moved[layer])}
    if left:
        logger.warning_once(
            f"cut-offs of experts in layers {_numbers(left)} never moved, so their tokens meet other experts here than "
            "in training; call model.update_routers(out.routings) after each step of training"
        )


def _has_moved(router: ExpertChoiceRouter) -> bool:
    return not torch.equal(router.cutoff.cpu(), router.initial_buffers()["cutoff"])


def _numbers(layers: set[str]) -> str:
    return ", ".join(sorted(layers, key=int))


def check_prompt(prompt: Tensor, given: dict[str, object]) -> None:
    """Refuses a prompt that generation cannot start from.

    Args:
        prompt: ``(B, T)`` ids or ``(B, T, D)`` embeddings.
        given: what goes with it; ids of longer sequences hold for generated positions too.

    Raises:
        InputError: if the prompt is empty, or ids are shorter than it.
    """
    shape = tuple(prompt.shape[:2])
    if prompt.ndim not in (2, 3):
        raise InputError(f"the prompt must be (B, T), got {tuple(prompt.shape)}; add a batch axis with [None]")
    if shape[1] == 0:
        raise InputError(f"the prompt is empty: it has shape {tuple(prompt.shape)}; pass at least one token a row")
    for name in ("modality_ids", "key_ids", "block_ids"):
        ids = given.get(name)
        check_tensor(name, ids, str(shape))
        if isinstance(ids, Tensor) and (ids.ndim != 2 or ids.shape[0] != shape[0] or ids.shape[1] < shape[1]):
            raise InputError(f"{name} must have shape {shape}, as the prompt, got {tuple(ids.shape)}")

"""Some of a model trained while the rest stays, down to single copies of a bank and single rows of the vocabulary.

The copies of a bank are one parameter, so a tower cannot be kept by ``requires_grad`` alone. What stays of a parameter
gets a gradient of zero, and :func:`keep_frozen` puts it back after a step of the optimizer, which may do more to a
weight than its gradient asks for, as weight decay does.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from omnimoe.config import ConfigError
from omnimoe.layers.uneven import Uneven
from omnimoe.model import OmniMoeConfig, OmniMoeForCausalLM
from omnimoe.routers import ByModalityRouter, Router, Routing
from omnimoe.towers import kept_copies

_ROWS, _HOOKS = "_omnimoe_frozen_rows", "_omnimoe_frozen_hooks"
_TABLES = ("model.embed_tokens.weight", "lm_head.weight", "lm_head.bias")

AnyOptimizer = TypeVar("AnyOptimizer", bound=torch.optim.Optimizer)


@dataclass(frozen=True, kw_only=True)
class Frozen:
    """What was frozen.

    Args:
        names: of keys and modalities.
        kept: weights that stay.
        trained: weights that do not.
        partly: parameters of which some copies or rows stay, and others are trained.
    """

    names: tuple[str, ...]
    kept: int
    trained: int
    partly: tuple[str, ...]


def freeze(model: OmniMoeForCausalLM, names: Iterable[str]) -> Frozen:
    """Keeps every weight that rows of some keys meet, so that what the model gives for them alone does not change.

    Copies that no such row meets are trained: with a tower for each modality, ``freeze(model, ["text"])`` trains the
    others, as LMFusion does. Weights that are shared with a frozen key stay. Of embeddings and head, the rows of frozen
    modalities stay, but for the boundary tokens of the others. Routers that adapt outside of the gradient stop.

    It holds for the model in memory; a saved one is loaded free.

    Args:
        model: the model, changed in place. It may be partly frozen already.
        names: keys, which are the modalities unless the config names others. Of a model with other keys, modalities may
            be named too, for their rows of the vocabulary and their own modules.

    Returns:
        What stays and what is trained.

    Raises:
        ConfigError: if a name is unknown, or nothing would be left to train; the model is as before then.

    Source: LMFusion, https://arxiv.org/abs/2412.15188.
    """
    config, chosen = model.config, (names,) if isinstance(names, str) else tuple(names)
    known = dict.fromkeys((*config.keys, *config.modality_names))
    unknown = [name for name in chosen if name not in known]
    if unknown or not chosen:
        raise ConfigError(f"freeze takes names out of {', '.join(known)}, got {', '.join(map(repr, unknown)) or '()'}")
    frozen = _frozen_copies(model, chosen)
    parameters = dict(model.named_parameters())
    if all(len(frozen.get(name, ())) == _copies(held) for name, held in parameters.items() if held.requires_grad):
        raise ConfigError(
            f"with {', '.join(chosen)} frozen nothing is left to train: every weight is met by their rows; give the "
            "others towers of their own"
        )
    for name, copies in frozen.items():
        _hold(parameters[name], copies)
    for path, module in model.named_modules():
        if isinstance(module, Router) and _stays(path, module, model, chosen):
            module.update = takes_nothing_in  # type: ignore[method-assign]
    partly = tuple(name for name, parameter in parameters.items() if frozen_rows(parameter) is not None)
    total = sum(parameter.numel() for parameter in parameters.values())
    trained = sum(_trained(parameter) for parameter in parameters.values())
    return Frozen(names=chosen, kept=total - trained, trained=trained, partly=partly)


def unfreeze(model: nn.Module) -> None:
    """Lets everything train again."""
    for parameter in model.parameters():
        for hook in getattr(parameter, _HOOKS, ()):
            hook.remove()
        for mark in (_ROWS, _HOOKS):
            if hasattr(parameter, mark):
                delattr(parameter, mark)
        parameter.requires_grad_(True)
    for module in model.modules():
        if isinstance(module, Router) and "update" in module.__dict__:
            del module.update


def frozen_rows(parameter: Tensor) -> Tensor | None:
    """The places along the leading axis that stay, ``(n,)`` int64; None where all or none of it does."""
    return getattr(parameter, _ROWS, None)


def keep_frozen(optimizer: AnyOptimizer) -> AnyOptimizer:
    """Makes an optimizer leave what is frozen of a parameter as it is, to the bit, whatever else it does.

    ``omnimoe.train`` does this itself. While a step is taken, the frozen part of each parameter is held twice.

    Args:
        optimizer: any, over parameters of a model that is frozen before the next step.

    Returns:
        The optimizer.
    """
    held: list[tuple[Tensor, Tensor, Tensor]] = []

    def before(optimizer: Any, args: Any, kwargs: Any) -> None:
        held.clear()
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                rows = frozen_rows(parameter)
                if rows is not None and parameter.grad is not None:
                    rows = rows.to(parameter.device)
                    held.append((parameter, rows, parameter.detach()[rows]))

    @torch.no_grad()
    def after(optimizer: Any, args: Any, kwargs: Any) -> None:
        while held:
            parameter, rows, before_step = held.pop()
            parameter.index_copy_(0, rows, before_step)

    optimizer.register_step_pre_hook(before)
    optimizer.register_step_post_hook(after)
    return optimizer


def _frozen_copies(model: OmniMoeForCausalLM, names: tuple[str, ...]) -> dict[str, tuple[int, ...]]:
    """Which copies of each parameter stay; a parameter none of which stays is left out."""
    config = model.config
    keys = tuple(i for i, name in enumerate(config.keys or config.modality_names) if name in names)
    found: dict[str, tuple[int, ...]] = {}
    free: set[str] = set()
    for path, module in model.named_modules():
        own = [name for name, _ in module.named_parameters()]
        for inner, copies in kept_copies(module, keys).items():
            if copies is not None:
                start = f"{inner}." if inner else ""
                found |= {f"{path}.{name}": copies for name in own if name == inner or name.startswith(start)}
        # parts that are one module a key or a copy
        inside: Iterable[str] = ()
        if isinstance(module, ByModalityRouter):
            inside = (f"routers.{key}." for key in range(len(module.routers)) if key not in keys)
        elif isinstance(module, Uneven):
            met = {module.towers[key] for key in keys}
            inside = (f"copies.{copy}." for copy in range(module.num_copies) if copy not in met)
        free |= {f"{path}.{name}" for start in inside for name in own if name.startswith(start)}
    rows = _rows(config, names)
    stay = tuple(i for i, name in enumerate(config.modality_names) if name in names)
    spans = list(pairwise(accumulate(config.learned_positions, initial=0)))
    places = tuple(row for i in stay if spans for row in range(*spans[i]))
    by_modality = {"aligned.weight": stay, "aligned.bias": stay, "model.kinds.weight": stay}
    by_modality |= {"model.places.weight": places}
    for name, parameter in model.named_parameters():
        if name in _TABLES:
            found[name] = rows
        elif name in by_modality:
            found[name] = by_modality[name]
        elif name.startswith("model.position_bias.tables."):
            found[name] = tuple(range(_copies(parameter))) if int(name.split(".")[3]) in stay else ()
        elif name.startswith("model.modalities."):
            found[name] = tuple(range(_copies(parameter))) if name.split(".")[2] in names else ()
        elif name not in found:
            found[name] = tuple(range(_copies(parameter))) if keys else ()
    return {name: copies for name, copies in found.items() if copies and name not in free}


def _rows(config: OmniMoeConfig, names: tuple[str, ...]) -> tuple[int, ...]:
    """The rows of the vocabulary that stay."""
    chosen = torch.tensor([i for i, name in enumerate(config.modality_names) if name in names], dtype=torch.int64)
    stays = torch.isin(config.modality_of_ids(), chosen)
    for modality in config.modalities:
        if modality.name not in names:
            markers = (modality.begin_id, modality.end_id, modality.placeholder_id)
            stays[[marker for marker in markers if marker is not None]] = False
    return tuple(stays.nonzero().squeeze(1).tolist())


def _hold(parameter: nn.Parameter, copies: tuple[int, ...]) -> None:
    before = frozen_rows(parameter)
    if before is not None:
        copies = tuple(sorted({*copies, *before.tolist()}))
    if len(copies) == _copies(parameter):
        parameter.requires_grad_(False)
        if before is not None:
            delattr(parameter, _ROWS)
    elif parameter.requires_grad:
        rows = torch.tensor(copies)
        hook = parameter.register_hook(lambda grad: grad.index_fill(0, rows.to(grad.device), 0))
        setattr(parameter, _ROWS, rows)
        setattr(parameter, _HOOKS, [*getattr(parameter, _HOOKS, ()), hook])


def _copies(parameter: Tensor) -> int:
    return len(parameter) if parameter.ndim else 1


def _trained(parameter: nn.Parameter) -> int:
    if not parameter.requires_grad:
        return 0
    rows = frozen_rows(parameter)
    return parameter.numel() if rows is None else parameter[0].numel() * (len(parameter) - len(rows))


def _stays(path: str, router: Router, model: OmniMoeForCausalLM, names: tuple[str, ...]) -> bool:
    """Whether rows of a frozen key meet a router; one that only holds others is asked through them."""
    keys = model.config.keys or model.config.modality_names
    above, _, last = path.rpartition(".routers.")
    if isinstance(router, ByModalityRouter):
        return False
    return keys[int(last)] in names if above and last.isdigit() else any(name in keys for name in names)


def takes_nothing_in(routing: Routing) -> None:
    """In the place of the update of a router that stays as it is."""


__all__ = ["Frozen", "freeze", "frozen_rows", "keep_frozen", "unfreeze"]

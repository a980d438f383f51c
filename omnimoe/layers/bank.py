"""Banks of copies: a weight with a leading copy axis, and the tower map that picks a copy by key.

"Shared" is a bank of one, Mixture-of-Transformers a bank with a copy a modality, a mixture of experts a bank whose copy
a router chooses. The key is the modality unless a model is given other keys (a role, a task, a language).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from omnimoe.config import ConfigError
from omnimoe.layers.rows import RowLayout

TowerMap = str | tuple[int, ...]
"""``"shared"``, ``"modality"`` (a copy a key), or the copy of each key: ``(0, 1, 1)`` merges keys 1 and 2."""

Start = float | str | Callable[[Tensor], Tensor]
"""How a parameter starts: a constant, ``"normal"`` (the model's initializer range), or what a function makes of it."""


def resolve_towers(towers: TowerMap, num_modalities: int) -> tuple[int, ...]:
    """The copy of each key.

    Args:
        towers: a tower map as a config writes it.
        num_modalities: number of keys, which are the modalities unless the model is given others.

    Returns:
        ``(num_modalities,)`` copy indices, every index from 0 up used.

    Raises:
        ConfigError: if the map has another length, a negative entry or an unused copy, or an unknown word.
    """
    if towers == "shared":
        return (0,) * num_modalities
    if towers == "modality":
        return tuple(range(num_modalities))
    if isinstance(towers, str):
        raise ConfigError(f"unknown tower map {towers!r}; write 'shared', 'modality' or a copy a key, (0, 1, 1)")
    copies = tuple(towers)
    if len(copies) != num_modalities:
        raise ConfigError(f"tower map {copies} has {len(copies)} entries for {num_modalities} keys; give one a key")
    if set(copies) != set(range(max(copies) + 1)):
        raise ConfigError(f"tower map {copies} must use every copy from 0 to {max(copies)} and nothing else")
    return copies


def num_copies(towers: tuple[int, ...]) -> int:
    """Copies a resolved map needs."""
    return max(towers) + 1


def plain(weight: Tensor) -> Tensor:
    """A weight as operations read it: one that torchao keeps quantised, as the numbers it stands for."""
    if type(weight) in (Tensor, nn.Parameter):  # a traced graph cannot read the name of a module
        return weight
    return weight.dequantize() if type(weight).__module__.startswith("torchao.") else weight


def select(weight: Tensor, towers: tuple[int, ...], rows: RowLayout) -> tuple[Tensor, Tensor]:
    """The weights and the run ends that put ``rows`` through their copies.

    Args:
        weight: ``(G, ...)``, the bank.
        towers: the copy of each key.
        rows: in key order.

    Returns:
        ``(S, ...)``, the copy of each run of rows, and ``(S,)`` int32, the end of each run.
    """
    ends, copies = rows.segments(towers)
    weight = plain(weight)
    return (weight if copies == list(range(len(weight))) else weight[copies]), ends


class Bank(nn.Module):
    """Base of the modules that hold banks.

    Args:
        towers: the copy of each key, resolved.
    """

    initial: dict[str, Start] = {}
    """How each own parameter starts."""

    def __init__(self, towers: tuple[int, ...]) -> None:
        super().__init__()
        self.towers = towers
        self.num_copies = num_copies(towers)

    def reset_parameters(self, std: float = 0.02) -> None:
        """Sets every own parameter to its start."""
        begin(self, std)


@torch.no_grad()
def begin(module: nn.Module, std: float = 0.02) -> None:
    """Sets the parameters that ``module.initial`` names to their start."""
    for name, start in module.initial.items():
        parameter = getattr(module, name, None)
        if parameter is None or parameter.is_meta:
            continue
        if callable(start):
            parameter.copy_(start(parameter))
        elif start == "normal":
            nn.init.normal_(parameter, std=std)
        else:
            nn.init.constant_(parameter, float(start))

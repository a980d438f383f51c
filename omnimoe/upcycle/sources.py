"""Where each weight of the new model starts: which copies of which weight of the seed."""

from __future__ import annotations

import functools
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from omnimoe.config import ConfigError
from omnimoe.layers import BankMLP
from omnimoe.layers.bank import Bank

TABLES = ("model.embed_tokens.weight", "lm_head.weight")


@dataclass(frozen=True)
class Start:
    """Where a weight starts.

    Args:
        key: name of the seed's weight.
        index: copies of its leading axis, one for each copy of the new weight; None for all of it.
        axis: the axis that copies lie on.
        scale: what each copy is multiplied by; none where empty.
        noise: share of the spread that copies of one copy are moved apart by.
    """

    key: str
    index: tuple[int, ...] | None = None
    axis: int = 0
    scale: tuple[float, ...] = ()
    noise: float = 0.0

    def shape(self, held: Tensor) -> tuple[int, ...]:
        """Of the new weight."""
        shape = list(held.shape)
        if self.index is not None:
            shape[self.axis] = len(self.index)
        return tuple(shape)

    def make(self, held: Tensor, generator: torch.Generator) -> Tensor:
        """The new weight, from that of the seed."""
        if self.index is None:
            return held.clone()
        made = held.index_select(self.axis, torch.tensor(self.index, device=held.device))
        if held.is_meta:
            return made
        for place, scale in enumerate(self.scale):
            if scale != 1:
                made.select(self.axis, place).mul_(scale)
        if self.noise and len(set(self.index)) < len(self.index):
            made.add_(self._apart(made, generator))
        return made

    def _apart(self, made: Tensor, generator: torch.Generator) -> Tensor:
        """Noise that sums to zero over the copies of one copy."""
        assert self.index is not None
        drawn = torch.randn(made.shape, generator=generator).to(made.device)
        index = torch.tensor(self.index, device=made.device)
        sums = torch.zeros(int(index.max()) + 1, *made.shape[1:], device=made.device).index_add(0, index, drawn)
        counts = torch.bincount(index).clamp_min(1).view(-1, *[1] * (made.ndim - 1))
        apart = drawn - (sums / counts)[index]
        return (self.noise * made.float().std() * apart).to(made.dtype)


@dataclass(frozen=True, kw_only=True)
class Change:
    """What can be said of a layer's experts.

    Args:
        where: the path of the experts.
        function: ``"exact"``, ``"rescaled"`` (right on average over rows) or ``"changed"``.
        why: in words.
    """

    where: str
    function: str
    why: str


@dataclass(frozen=True, kw_only=True)
class Choices:
    """What decides how parts start.

    Args:
        origin: of each key, the key of the seed that it starts as.
        placement: of the layer's norms.
        rescale: divide the copies' last matrix by the weights' sum.
        expert_noise: on copies of experts.
        router_noise: on the rows of a router for copies of one expert.
    """

    origin: tuple[int, ...]
    placement: str = "pre"
    rescale: bool = True
    expert_noise: float = 0.0
    router_noise: float = 0.0


@dataclass
class Plan:
    """Where weights start.

    Args:
        starts: by name; what is not named is new.
        changes: what can be said of experts.
        fresh: names that are new, though the seed has weights of that name.
        factors: what new weights are multiplied by once they are drawn.
    """

    starts: dict[str, Start] = field(default_factory=dict)
    changes: list[Change] = field(default_factory=list)
    fresh: set[str] = field(default_factory=set)
    factors: dict[str, float] = field(default_factory=dict)


@functools.singledispatch
def start_of(new: nn.Module, old: nn.Module, choices: Choices) -> Plan:
    """Where the weights of a module start, by their paths inside of it.

    What is not named starts as the seed's weight of that name, if it has that shape, and is new otherwise. Where a part
    of yours has banks, register what their copies start as: ``@start_of.register(MyExperts)``.

    Args:
        new: of the new model.
        old: of the seed, at the same path.
        choices: of the call.
    """
    return Plan()


@start_of.register
def _(new: Bank, old: nn.Module, choices: Choices) -> Plan:
    if not isinstance(old, Bank):
        return Plan()
    index = copies_of(new.towers, old.towers, choices.origin)
    return Plan({name: Start(name, index) for name, _ in new.named_parameters(recurse=False)})


@start_of.register
def _(new: BankMLP, old: nn.Module, choices: Choices) -> Plan:
    return Plan()  # its owner knows what its copies are over


def copies_of(new: tuple[int, ...], old: tuple[int, ...], origin: tuple[int, ...]) -> tuple[int, ...]:
    """The copy of the seed that each new copy starts as, both maps resolved.

    Raises:
        ConfigError: if copies that differ would become one.
    """
    index: dict[int, int] = {}
    for key, copy in enumerate(new):
        source = old[origin[key]]
        if index.setdefault(copy, source) != source:
            raise ConfigError(
                f"the tower map {new} would merge copies of the seed that differ, those of its map {old}; towers can "
                "be parted and not joined"
            )
    return tuple(index[copy] for copy in sorted(index))


def plan_of(new: nn.Module, old: nn.Module, placements: list[str], choices: Choices) -> Plan:
    """Where every weight and buffer of the new model starts, but for the rows of the vocabulary.

    Raises:
        ConfigError: if what a weight starts as does not fit it.
    """
    plan, before, held = Plan(), dict(old.named_modules()), old.state_dict()
    for path, module in new.named_modules():
        if path not in before:
            continue
        layer = path.split(".")
        here = choices
        if "layers" in layer and layer.index("layers") + 1 < len(layer):
            here = replace(choices, placement=placements[int(layer[layer.index("layers") + 1])])
        part = start_of(module, before[path], here)
        start = f"{path}." if path else ""
        for name, found in part.starts.items():
            plan.starts.setdefault(start + name, replace(found, key=start + found.key))
        plan.changes += [replace(change, where=path) for change in part.changes]
        plan.factors |= {start + name: factor for name, factor in part.factors.items()}
        plan.fresh |= {start + name for name in part.fresh}
    for name, tensor in new.state_dict().items():
        if name in TABLES:
            continue
        if name not in plan.starts and name not in plan.fresh and name in held and held[name].shape == tensor.shape:
            plan.starts[name] = Start(name)
        found = plan.starts.get(name, Start(name) if name in held and name not in plan.fresh else None)
        has = None if found is None or found.key not in held else found.shape(held[found.key])
        if found is not None and has != tuple(tensor.shape):
            raise ConfigError(
                f"{name} is to be {tuple(tensor.shape)}, and the seed has {has} for it: sizes other than the number of "
                "copies stay as they are; a part of your own says how its copies start, see omnimoe.upcycle.start_of"
            )
    return plan


__all__ = ["Change", "Choices", "Plan", "Start", "copies_of", "plan_of", "start_of"]

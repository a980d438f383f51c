"""Where experts inside of attention start: as copies of the projections that the seed has."""

from __future__ import annotations

from torch import nn

from omnimoe.config import ConfigError
from omnimoe.experts import RoutedAttention
from omnimoe.layers import Attention, BankLinear, ExpertLinear
from omnimoe.upcycle.experts import pools_of
from omnimoe.upcycle.gates import CHANGED, EXACT
from omnimoe.upcycle.sources import Change, Choices, Plan, Start, start_of


@start_of.register
def _(new: ExpertLinear, old: nn.Module, choices: Choices) -> Plan:
    return Plan()  # its owner knows what its copies are over


@start_of.register
def _(new: RoutedAttention, old: nn.Module, choices: Choices) -> Plan:
    if not isinstance(old, Attention):
        raise ConfigError(f"experts of attention cannot be started from {type(old).__qualname__}")
    plan = Plan()
    outcomes: dict[str, str] = {}
    for site in new.declared.routed_sites:
        held = getattr(old, site)
        if isinstance(held, ExpertLinear) != isinstance(old, RoutedAttention) or not isinstance(held, BankLinear):
            raise ConfigError(f"{site} cannot start as experts of attention: the seed has {type(held).__qualname__}")
        source = old if isinstance(old, RoutedAttention) else held
        index: list[int] = []
        for pool in pools_of(new, source, choices.origin):
            index += pool.index
            gate = pool.gate(new, source, choices)
            # a factor on queries and keys moves every weight of attention, so none can be made up for
            outcomes.setdefault(EXACT if gate.gain == 1 and gate.is_even else CHANGED, gate.why)
            plan.starts |= dict(pool.router_starts(choices))
            plan.fresh |= pool.fresh
        for name, _ in getattr(new, site).named_parameters():
            plan.starts[f"{site}.{name}"] = Start(f"{site}.{name}", tuple(index), noise=choices.expert_noise)
        if choices.expert_noise and len(set(index)) < len(index):
            outcomes[CHANGED] = f"copies are moved apart by {choices.expert_noise:g} of their spread"
    worst = CHANGED if CHANGED in outcomes else EXACT
    plan.changes.append(Change(where="", function=worst, why=outcomes[worst]))
    return plan

"""Where experts inside of attention start: as copies of the projections that the seed has."""

from __future__ import annotations

from torch import nn

from omnimoe.config import ConfigError
from omnimoe.experts import RoutedProjections
from omnimoe.layers import BankLinear, ExpertLinear
from omnimoe.upcycle.experts import BESIDE, pools_of, stand_alike
from omnimoe.upcycle.gates import CHANGED, EXACT
from omnimoe.upcycle.sources import Change, Choices, Plan, Start, start_of

FORM = ("experts_at", "own_heads")
"""Fields that say where experts stand and where what they give is added up."""


@start_of.register
def _(new: ExpertLinear, old: nn.Module, choices: Choices) -> Plan:
    return Plan()  # its owner knows what its copies are over


@start_of.register
def _(new: RoutedProjections, old: nn.Module, choices: Choices) -> Plan:
    plan, was_routed = Plan(), isinstance(old, RoutedProjections)
    outcomes: dict[str, str] = {}
    for site in new.declared.experts_at:
        held = getattr(old, site, None)
        if not isinstance(held, BankLinear) or isinstance(held, ExpertLinear) != was_routed:
            raise ConfigError(f"{site} cannot start as experts of attention: the seed has {type(held).__name__} there")
        source = old if was_routed else held
        index: list[int] = []
        for pool in pools_of(new, source, choices.origin):
            index += pool.index
            gate = pool.gate(new, source, choices)
            # a factor on queries and keys moves every weight of attention, so none can be made up for
            outcomes.setdefault(EXACT if gate.gain == 1 and gate.is_even else CHANGED, gate.why)
            plan.starts |= dict(pool.router_starts(choices))
            plan.fresh |= pool.fresh
            if was_routed and pool.fresh:
                outcomes[CHANGED] = f"of the router, {', '.join(sorted(pool.fresh))} is new"
        shared = new.declared.num_shared_experts
        kept = old.declared.num_shared_experts if isinstance(old, RoutedProjections) else 0
        if kept not in (0, shared):
            raise ConfigError(f"the seed has {kept} shared experts in attention, and {shared} were asked for")
        first = old.num_experts if isinstance(old, RoutedProjections) and kept else 0
        beside = tuple(first + number if kept else 0 for number in range(shared))
        # shared experts beside copies add nothing at first
        scale = (1.0,) * len(index) + (float(bool(kept)),) * shared
        for name, _ in getattr(new, site).named_parameters():
            plan.starts[f"{site}.{name}"] = Start(
                f"{site}.{name}", (*index, *beside), scale=scale, noise=choices.expert_noise
            )
        if choices.expert_noise and len(set(index)) < len(index):
            outcomes[CHANGED] = f"copies are moved apart by {choices.expert_noise:g} of their spread"
    if isinstance(old, RoutedProjections):
        forms = [tuple(getattr(part.declared, name, None) for name in FORM) for part in (new, old)]
        if forms[0] != forms[1]:
            outcomes[CHANGED] = "experts are at other projections, or meet in another place, than in the seed"
        if not stand_alike(new.declared, old.declared):
            outcomes[CHANGED] = BESIDE
    worst = CHANGED if CHANGED in outcomes else EXACT
    plan.changes.append(Change(where="", function=worst, why=outcomes[worst]))
    return plan

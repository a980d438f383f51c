"""What becomes of a network when copies of it come under a router: the sum of the weights that a row's copies get.

Where that sum is one, copies give what the network gave. Under a norm behind the experts ("post") any other sum is
divided away, as long as some expert takes the row. Before a norm ("pre") the last matrix of the copies is divided by
the mean of the sum.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from omnimoe.experts import RoutedExperts, RoutedProjections
from omnimoe.routers import ExpertChoiceRouter, HashRouter, Router, StaticRouter, TopKRouter
from omnimoe.routers.scores import SCORES
from omnimoe.upcycle.target import multiplied

RoutedConfig = RoutedExperts.Config | RoutedProjections.Config

EXACT, RESCALED, CHANGED = "exact", "rescaled", "changed"


@dataclass(frozen=True)
class Gate:
    """The weights of a row's copies.

    Args:
        gain: their sum; its mean where it is not the same for every row; None where it is not known.
        is_even: every row has that sum.
        reaches_all: every row is taken by some expert.
        why: in words.
        keeps_shares: the copies of an expert weigh what it did beside the others, whatever the sum.
    """

    gain: float | None
    is_even: bool
    reaches_all: bool
    why: str
    keeps_shares: bool = True

    def outcome(self, placement: str) -> tuple[str, float]:
        """What can be said of the function, and what the last matrix of the copies is to be multiplied by."""
        if self.gain is None:
            return CHANGED, 1.0
        if placement == "post" and self.gain > 0:
            kept = EXACT if self.keeps_shares else RESCALED
            return (kept if self.reaches_all else CHANGED), 1.0
        if self.is_even:
            return EXACT, 1 / self.gain
        return (RESCALED if self.reaches_all else CHANGED), 1 / self.gain


UNROUTED = Gate(1.0, True, True, "a network without a router")
REMIXED = Gate(None, False, True, "experts that a key's rows met together weigh otherwise than they did")
SAME_ROUTES = Gate(1.0, True, True, "the seed's routes")
UNGATED = Gate(None, False, True, "the seed weighed a lone expert, the new model does not")


def fresh_gate(router: Router.Config, count: int, config: RoutedConfig) -> Gate:
    """The weights under a fresh router over ``count`` copies of one network.

    Args:
        router: inside the group.
        count: copies that it chooses among.
        config: of the experts.
    """
    odd = _oddity(router, config)
    if odd:
        return Gate(None, False, False, odd)
    if isinstance(router, StaticRouter.Config):
        return Gate(1.0, router.combine == "mean", True, "static routes weigh one")
    if isinstance(router, ExpertChoiceRouter.Config):
        start = float(SCORES[router.score](torch.zeros(count))[0])
        told = f"an expert weighs a row {start:.3g} at first, and a row is taken by any number of them, none too"
        return Gate(router.capacity_factor * start, False, False, told)
    if not isinstance(router, TopKRouter.Config):
        return Gate(None, False, False, f"what {type(router).__qualname__} weighs is not known")
    scale = router.routed_scaling_factor
    if isinstance(router, HashRouter.Config) and not router.is_learned:
        return Gate(scale, True, True, "a table weighs all choices alike")
    if router.normalize and router.top_k > 1:
        return Gate(scale, True, True, f"the {router.top_k} weights of a row sum to {scale:g}")
    if router.score == "softmax" and router.top_k == count:
        return Gate(scale, True, True, "a softmax over all that is chosen sums to one")
    start = float(SCORES[router.score](torch.zeros(count))[0])
    told = f"{router.top_k} weights of {start:.3g} at first, not divided by their sum"
    return Gate(router.top_k * start * scale, False, True, told)


def copied_gate(
    router: Router.Config,
    old: Router.Config,
    times: int,
    config: RoutedConfig,
    noise: float,
    *,
    is_split: bool = False,
) -> Gate:
    """The weights under a router that has a row for each copy of an expert that was routed before.

    Args:
        router: of the new model.
        old: of the seed.
        times: copies of each expert; 0 where it is not the same for all.
        config: of the experts.
        noise: on the rows of copies.
        is_split: rows that met one router in the seed meet several.
    """
    if is_split and not old.is_causal:
        return Gate(None, False, False, "rows that competed with each other compete inside their own group")
    if times == 1 and router == old:
        return Gate(1.0, True, True, "the seed's router")
    if type(router) is not type(old) or times == 0:
        return Gate(None, False, False, "another router, or another number of copies for each expert")
    if router != multiplied(old, times):
        return Gate(None, False, False, f"a row may be given copies of one expert where it met {times} different ones")
    if times > 1:
        odd = _oddity(router, config) or (
            "copies fill groups of experts" if getattr(router, "num_groups", 1) > 1 else ""
        )
        if odd:
            return Gate(None, False, False, odd)
    if noise:
        told = f"the seed's router, the rows of copies apart by {noise:g} of their spread"
        return Gate(1.0, False, True, told, keeps_shares=False)
    if isinstance(router, ExpertChoiceRouter.Config) and router.score != "softmax":
        return Gate(float(times), True, True, f"{times} copies weigh a row what one did")
    return Gate(1.0, True, True, f"{times} copies share what one had")


def _oddity(router: Router.Config, config: RoutedConfig) -> str:
    """What keeps the sum from being told."""
    if isinstance(config, RoutedExperts.Config) and config.weights_on == "input":
        return "weights multiply what experts get, and a network does not scale with that"
    if config.free_experts or config.shared_gate == "softmax":
        return "experts beside the copies take part of the weights"
    if isinstance(router, TopKRouter.Config):
        if router.has_capacity or router.later_choice_threshold is not None:
            return "choices beyond the capacity are dropped"
        if router.top_p is not None and not (router.normalize and router.top_k > 1):
            return "a row may take fewer experts than top_k"
    return ""

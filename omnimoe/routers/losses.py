"""Losses that keep a learned router balanced, decided and its logits small. All in float32, none with a coefficient.

A loss "by group" is taken inside each group of rows, a key's or a sequence's, and averaged over groups by their rows.
Everywhere ``counted``, ``(N,)`` bool, leaves rows out that nothing may depend on; None counts all.
"""

from __future__ import annotations

import math

import torch
import torch.distributed as dist
from torch import Tensor

LOAD_BALANCE_FORMS = ("choices", "choices_per_token", "first_choice")
"""How load is counted, see :func:`load_balance_loss`."""


def load_balance_loss(
    router_probs: Tensor,
    expert_ids: Tensor,
    top_k: int = 1,
    *,
    form: str = "choices",
    groups: Tensor | None = None,
    num_groups: int = 1,
    counted: Tensor | None = None,
    across_ranks: bool = False,
) -> Tensor:
    """Experts times the sum over experts of (load) x (mean probability).

    A coefficient means the same in two places if load is counted in one form:

    * ``"choices"``: the share of all choices; perfect balance gives 1 for any ``top_k`` (Switch, OLMo-core);
    * ``"choices_per_token"``: choices a token; perfect balance gives ``top_k``, so a coefficient counts ``top_k`` times
      as much, or as many times as a token makes choices, where that differs (transformers' Mixtral, OLMoE, Qwen-MoE
      and the models made after them);
    * ``"first_choice"``: the share of first choices alone; perfect balance gives 1 (GShard, NLLB-MoE, DeepSpeed).

    Args:
        router_probs: ``(N, E)`` float32 that sum to one over experts.
        expert_ids: ``(N * top_k,)`` int64, the experts that each row chose, side by side, the first choice first; -1
            counts for none.
        top_k: choices a token.
        form: one of :data:`LOAD_BALANCE_FORMS`.
        groups: ``(N,)`` int64, the group of each row; one group where None.
        num_groups: number of groups.
        counted: see the head of the file.
        across_ranks: count load over all ranks of the default process group (https://arxiv.org/abs/2501.11873), so that
            a batch of one topic need not be balanced by itself. Every rank then calls this.

    Returns:
        A scalar: 0 without rows; E (times ``top_k`` in the second form) when one expert takes all with certainty.

    Source: Switch Transformer, https://arxiv.org/abs/2101.03961, eq. 4.
    """
    num_rows, num_experts = router_probs.shape
    if form == "first_choice":
        expert_ids, top_k = expert_ids.view(-1, top_k)[:, 0], 1
    which = torch.zeros(num_rows, dtype=torch.int64, device=router_probs.device) if groups is None else groups
    present = _present(router_probs, counted)
    sums = router_probs.new_zeros(num_groups, num_experts).index_add(0, which, router_probs * present.unsqueeze(1))
    sizes = router_probs.new_zeros(num_groups).index_add(0, which, present)
    taken = (expert_ids >= 0) * present.repeat_interleave(top_k)
    cells = which.repeat_interleave(top_k) * num_experts + expert_ids.clamp_min(0)
    counts = router_probs.new_zeros(num_groups * num_experts).index_add(0, cells, taken).view(num_groups, num_experts)
    if across_ranks:
        counts = all_ranks(counts)
    if form == "choices_per_token":
        rows = all_ranks(sizes) if across_ranks else sizes
        load = counts / rows.unsqueeze(1).clamp_min(1)
    else:
        load = counts / counts.sum(-1, keepdim=True).clamp_min(1)
    each = num_experts * (load * sums / sizes.unsqueeze(1).clamp_min(1)).sum(-1)
    return (each * sizes).sum() / present.sum().clamp_min(1)


def _present(router_probs: Tensor, counted: Tensor | None) -> Tensor:
    """1 for each row that counts, 0 for others."""
    return router_probs.new_ones(len(router_probs)) if counted is None else counted.to(router_probs.dtype)


def all_ranks(counts: Tensor) -> Tensor:
    """The sum over all ranks of the default process group; what was given where there is none. No gradient passes."""
    counts = counts.detach()
    if dist.is_available() and dist.is_initialized():
        counts = counts.clone()
        dist.all_reduce(counts)
    return counts


def router_z_loss(router_logits: Tensor, counted: Tensor | None = None) -> Tensor:
    """Mean of the squared log-sum-exp of the logits.

    Args:
        router_logits: ``(N, E)`` float32.
        counted: see the head of the file.

    Returns:
        A scalar; 0 without rows.

    Source: ST-MoE, https://arxiv.org/abs/2202.08906.
    """
    present = _present(router_logits, counted)
    return (torch.logsumexp(router_logits, dim=-1).square() * present).sum() / present.sum().clamp_min(1)


def importance_loss(router_probs: Tensor, counted: Tensor | None = None) -> Tensor:
    """Squared coefficient of variation, over experts, of the probability that all rows together give them.

    Args:
        router_probs: ``(N, E)`` float32.
        counted: see the head of the file.

    Returns:
        A scalar: 0 where all experts are given as much, ``E - 1`` where one is given all; 0 without rows.

    Source: https://arxiv.org/abs/1701.06538, as in V-MoE, https://arxiv.org/abs/2106.05974.
    """
    return _variation((router_probs * _present(router_probs, counted).unsqueeze(1)).sum(0))


def load_loss(
    router_logits: Tensor, noisy_logits: Tensor, top_k: int, noise: float, counted: Tensor | None = None
) -> Tensor:
    """Squared coefficient of variation, over experts, of the rows that would choose each if the noise were drawn again.

    Args:
        router_logits: ``(N, E)`` float32, without noise.
        noisy_logits: ``(N, E)`` float32, those that the choice was made by.
        top_k: choices a row.
        noise: standard deviation of the normal noise, above 0.
        counted: see the head of the file.

    Returns:
        A scalar; 0 at balance and without rows.

    Source: V-MoE, https://arxiv.org/abs/2106.05974, appendix A: the threshold is the ``top_k``-th best noisy logit.
    """
    threshold = noisy_logits.topk(top_k, dim=-1).values[:, -1:]
    chosen = 0.5 * (1 + torch.erf((router_logits - threshold) / (noise * math.sqrt(2))))
    return _variation((chosen * _present(chosen, counted).unsqueeze(1)).sum(0))


def _variation(amount: Tensor) -> Tensor:
    """Variance over squared mean."""
    tiny = torch.finfo(amount.dtype).tiny
    return amount.var(correction=0) / amount.mean().square().clamp_min(tiny)


def entropy_losses(
    router_probs: Tensor, groups: Tensor, num_groups: int, num_experts_wanted: float, counted: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """LIMoE's two terms, group by group: a row is to be sure of its expert, a group is to use several.

    Args:
        router_probs: ``(N, E)`` float32.
        groups: ``(N,)`` int64, the modality or key of each row.
        num_groups: number of groups.
        num_experts_wanted: S; the global term is zero once a group's mean probability has the entropy of S experts.
        counted: see the head of the file.

    Returns:
        The local and the global term, scalars, each the mean over the groups that have rows: the mean entropy of a row,
        and ``max(0, log S - entropy of the mean probability)``. 0 without rows.

    Source: LIMoE, https://arxiv.org/abs/2206.02770.
    """
    present = _present(router_probs, counted)
    sizes = router_probs.new_zeros(num_groups).index_add(0, groups, present)
    own = router_probs.new_zeros(num_groups).index_add(0, groups, entropy(router_probs) * present)
    sums = router_probs.new_zeros(num_groups, router_probs.shape[1])
    sums = sums.index_add(0, groups, router_probs * present.unsqueeze(1))
    missing = (math.log(num_experts_wanted) - entropy(sums / sizes.unsqueeze(1).clamp_min(1))).clamp_min(0)
    is_there = (sizes > 0).to(router_probs.dtype)
    num_there = is_there.sum().clamp_min(1)
    return (own / sizes.clamp_min(1)).sum() / num_there, (missing * is_there).sum() / num_there


def entropy(probs: Tensor) -> Tensor:
    """Of the last axis, in nats; 0 log 0 is 0, and has no gradient."""
    return -(probs * probs.clamp_min(torch.finfo(probs.dtype).tiny).log()).sum(-1)


def orthogonality_loss(weight: Tensor) -> Tensor:
    """Mean square of the entries of ``W W^T - I``, W the router's rows at unit length.

    Args:
        weight: ``(E, D)``, a row an expert.

    Returns:
        A scalar: 0 where all experts look in directions at right angles.

    Source: ERNIE 4.5, which takes it as a step of its own after the optimizer's rather than as a loss.
    """
    unit = torch.nn.functional.normalize(weight.float(), dim=-1)
    return (unit @ unit.t() - torch.eye(len(weight), device=weight.device)).square().mean()


def mutual_information(router_probs: Tensor, groups: Tensor, num_groups: int, counted: Tensor | None = None) -> Tensor:
    """What the expert of a row tells of its group, a task or a modality, in nats.

    Args:
        router_probs: ``(N, E)`` float32; or choices, each row summing to one.
        groups: ``(N,)`` int64.
        num_groups: number of groups.
        counted: see the head of the file.

    Returns:
        A scalar from 0, all groups use experts alike, to the entropy of the groups, no expert is shared.

    Source: Mod-Squad, https://arxiv.org/abs/2212.08066, which subtracts it from the loss.
    """
    present = _present(router_probs, counted)
    joint = router_probs.new_zeros(num_groups, router_probs.shape[1])
    joint = joint.index_add(0, groups, router_probs * present.unsqueeze(1)) / present.sum().clamp_min(1)
    return entropy(joint.sum(0)) + entropy(joint.sum(1)) - entropy(joint.flatten())

"""Losses that keep a learned router balanced and its logits small. All in float32."""

from __future__ import annotations

import torch
from torch import Tensor


def load_balance_loss(router_probs: Tensor, expert_ids: Tensor, top_k: int = 1) -> Tensor:
    """Experts times the sum over experts of (share of routed rows) x (mean probability).

    Args:
        router_probs: ``(N, E)`` float32 that sum to one over experts.
        expert_ids: ``(R,)`` int64, the experts that were chosen.
        top_k: choices a token; the share is of R = N·top_k routed rows, so that perfect balance gives 1 for any top_k.

    Returns:
        A scalar: 1 at perfect balance, E when one expert takes all; 0 without rows.

    Source: Switch Transformer, https://arxiv.org/abs/2101.03961, eq. 4; the normalisation by top_k as in OLMo-core.
    """
    num_experts = router_probs.shape[1]
    if len(router_probs) == 0:
        return router_probs.sum()
    counts = torch.zeros(num_experts, dtype=router_probs.dtype, device=router_probs.device)
    counts.scatter_add_(0, expert_ids, torch.ones_like(expert_ids, dtype=router_probs.dtype))
    share = counts / (len(router_probs) * top_k)
    return num_experts * (share * router_probs.mean(0)).sum()


def router_z_loss(router_logits: Tensor) -> Tensor:
    """Mean of the squared log-sum-exp of the logits.

    Args:
        router_logits: ``(N, E)`` float32.

    Returns:
        A scalar; 0 without rows.

    Source: ST-MoE, https://arxiv.org/abs/2202.08906.
    """
    if len(router_logits) == 0:
        return router_logits.sum()
    return torch.logsumexp(router_logits, dim=-1).square().mean()

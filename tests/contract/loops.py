"""What ``generate`` must give, as loops over forwards of everything."""

from __future__ import annotations

import torch
from torch import Tensor

from omnimoe.model import OmniMoeForCausalLM
from tests.declarations import DECLARATIONS, build, ids_like

KINDS = ("dense", "mot", "moe", "moma_top_k", "mot_hybrid")
FREE = {"eos_token_id": None, "free": True}
GREEDY = {**FREE, "do_sample": False}


def made(name: str, batch_size: int = 2, length: int = 5) -> tuple[OmniMoeForCausalLM, Tensor]:
    config = DECLARATIONS[name]
    return build(config), ids_like(config, batch_size, length)


@torch.no_grad()
def log_probs(model: OmniMoeForCausalLM, ids: Tensor) -> Tensor:
    """``(B, V)`` of the next token, by a forward over everything."""
    return model(ids).logits[:, -1].float().log_softmax(-1)


def greedy(model: OmniMoeForCausalLM, ids: Tensor, count: int) -> Tensor:
    for _ in range(count):
        ids = torch.cat((ids, log_probs(model, ids).argmax(-1, keepdim=True)), 1)
    return ids

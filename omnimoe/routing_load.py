"""Measures which copies of each layer's feed-forward bank the tokens of each modality meet, on given batches."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from omnimoe.model import OmniMoeForCausalLM
from omnimoe.plots import draw_routing
from omnimoe.routing_trace import record_routing


@torch.no_grad()
def routing_load(model: OmniMoeForCausalLM, batches: Iterable[dict[str, Tensor]]) -> Tensor:
    """Share of each modality's tokens that meets each copy, in evaluation mode.

    Args:
        model: any declaration: a tower map gives whole numbers, a router what it chose.
        batches: inputs of the model.

    Returns:
        ``(L, M, E)`` float64, E the largest number of copies of any layer; over copies it sums to the experts a token
        meets on average. A modality without tokens has zeros.
    """
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    with record_routing(model) as trace:
        for batch in batches:
            model(**{name: value.to(device) for name, value in batch.items() if name != "labels"}, logits_to_keep=1)
    model.train(was_training)
    return trace.load()


def draw_model_routing(
    model: OmniMoeForCausalLM, batches: Sequence[dict[str, Tensor]], path: Path, *, title: str = ""
) -> Path:
    """Draws :func:`routing_load` over batches, and the modalities of the first sequence.

    Args:
        model: any declaration.
        batches: inputs of the model, at least one.
        path: where the PNG goes.
        title: of the picture.

    Returns:
        The path.
    """
    load = routing_load(model, batches).numpy()
    path.parent.mkdir(parents=True, exist_ok=True)
    ids = batches[0]["modality_ids"][0].cpu().numpy()
    return draw_routing(load, ids, model.config.modality_names, path, title=title)

"""Measures which copies of each layer's feed-forward bank the tokens of each modality meet."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from omnimoe.experts import Experts, FeedForward
from omnimoe.model import OmniMoeForCausalLM
from omnimoe.plots import draw_routing


@torch.no_grad()
def routing_load(model: OmniMoeForCausalLM, batches: Iterable[dict[str, Tensor]]) -> Tensor:
    """Share of each modality's tokens that meets each copy.

    Args:
        model: any declaration: a tower map gives whole numbers, a router what it chose.
        batches: inputs of the model.

    Returns:
        ``(L, M, E)`` float64, E the largest number of copies of any layer; over copies it sums to the experts a token
        meets on average. A modality without tokens has zeros.
    """
    layers = model.model.backbone.layers
    names = model.config.modality_names
    num_copies = max((_copies(layer.mlp) for layer in layers), default=1)
    met = torch.zeros(len(layers), len(names), num_copies, dtype=torch.float64)
    seen = torch.zeros(len(names), dtype=torch.float64)
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    for batch in batches:
        out = model(**{name: value.to(device) for name, value in batch.items() if name != "labels"}, logits_to_keep=1)
        rows = out.rows
        modality_ids = rows.modality_ids.cpu()
        seen += torch.bincount(modality_ids, minlength=len(names)).double()
        for index, (layer, routing) in enumerate(zip(layers, out.routings, strict=True)):
            if routing is not None:
                which = modality_ids[routing.token_index.cpu()] * num_copies + routing.expert_ids.cpu()
            elif isinstance(layer.mlp, FeedForward):
                which = modality_ids * num_copies + torch.tensor(layer.mlp.towers)[rows.key_ids.cpu()]
            else:
                continue
            met[index] += torch.bincount(which, minlength=len(names) * num_copies).view(len(names), -1)
    model.train(was_training)
    return met / seen.clamp_min(1).view(1, -1, 1)


def _copies(part: Experts) -> int:
    """Copies of a layer's bank; 1 for a part that neither routes nor has towers."""
    if isinstance(part, FeedForward):
        return max(part.towers) + 1
    return int(getattr(part, "num_experts", 1))


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

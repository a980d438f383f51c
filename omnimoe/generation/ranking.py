"""Likelihood of spans given others, by which generated candidates are ranked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from omnimoe.generation.media import GenerationError
from omnimoe.generation.prompts import lay_out_prompt, pad_prompts
from omnimoe.model import OmniMoeForCausalLM
from omnimoe.spans import span_positions

Spans = Sequence[tuple[str, Tensor]]
"""Modality and local ids ``(n,)`` or rows ``(n, C)``, in order."""


@torch.no_grad()
def log_likelihood(
    model: OmniMoeForCausalLM,
    pairs: Sequence[tuple[Spans, Spans]],
    *,
    batch_size: int = 32,
    grids: Mapping[str, Sequence[int]] | None = None,
) -> list[float]:
    """Log-likelihood of spans given others: ``log p(caption, end of document | picture)``.

    Args:
        model: in evaluation mode.
        pairs: what is given, and what is told after it; the latter of discrete modalities.
        batch_size: documents of a forward.
        grids: rows and columns by modality, for positions in several axes.

    Returns:
        One sum of log-probabilities for each pair, in nats: of everything after what is given, boundary tokens and the
        end of the document among it.

    Raises:
        GenerationError: if nothing is told, or it is continuous.
    """
    config, device = model.config, model.device
    for _, told in pairs:
        if not told or any(held.is_floating_point() for _, held in told):
            raise GenerationError("a likelihood needs inputs of discrete modalities; leave best_of out")
    found: list[float] = []
    for start in range(0, len(pairs), batch_size):
        part = pairs[start : start + batch_size]
        prompts = [lay_out_prompt(config, [*given, *told], is_closed=True) for given, told in part]
        batch = pad_prompts(config, prompts, side="right")
        ids, mask = batch["input_ids"].to(device), batch["attention_mask"].to(device)
        labels = ids.masked_fill(mask == 0, -100)
        for row, (given, _) in enumerate(part):
            labels[row, : len(lay_out_prompt(config, given).ids)] = -100
        out = model(
            ids,
            attention_mask=mask,
            position_ids=None if grids is None else span_positions(config, ids, grids, mask),
            labels=labels,
            features={name: rows.to(device) for name, rows in batch["features"].items()}
            if "features" in batch
            else None,
        )
        found += (-out.token_losses.double().sum(1)).tolist()
    return found

"""Spans of a continuous modality behind prompts: laid out as placeholders, then denoised."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Generator, Tensor

from omnimoe.denoise import denoise
from omnimoe.generation.prompts import Prompt, layout_ranges, pad_prompts
from omnimoe.model import OmniMoeForCausalLM
from omnimoe.spans import span_positions


def draw_latents(
    model: OmniMoeForCausalLM,
    name: str,
    prompts: Sequence[Prompt],
    generators: Sequence[Generator],
    *,
    steps: int,
    guidance: float = 1.0,
    grids: dict[str, tuple[int, ...]] | None = None,
) -> list[Tensor]:
    """Draws one span a prompt.

    Args:
        model: the model.
        name: the continuous modality, whose spans have a fixed length.
        prompts: the rows, each with the begin token of ``name`` last, if it has one.
        generators: of the noise of each row.
        steps: of the sampler.
        guidance: scale of classifier-free guidance.
        grids: rows and columns by modality, for positions in several axes.

    Returns:
        ``(n, C)`` rows for each prompt, on the CPU in float32.
    """
    config, device = model.config, model.device
    batch = pad_prompts(config, [with_span(model, name, prompt) for prompt in prompts])
    ids, mask = batch["input_ids"].to(device), batch["attention_mask"].to(device)
    held = layout_ranges(config)[name]
    length = held.num_tokens or 0
    tail = 0 if held.end_id is None else 1
    drawn = torch.zeros_like(mask, dtype=torch.bool)
    drawn[:, ids.shape[1] - tail - length : ids.shape[1] - tail] = True
    channels = model.model.modalities[name].config.channels
    noise = torch.cat([torch.randn(length, channels, generator=held) for held in generators])
    rows = denoise(
        model,
        name,
        ids,
        attention_mask=mask,
        position_ids=None if grids is None else span_positions(config, ids, grids, mask),
        features={other: rows.to(device) for other, rows in batch.get("features", {}).items()},
        drawn=drawn,
        steps=steps,
        noise=noise.to(device),
        guidance=guidance,
    )
    return list(rows.float().cpu().split(length))


def with_span(model: OmniMoeForCausalLM, name: str, prompt: Prompt, rows: Tensor | None = None) -> Prompt:
    """A prompt with a whole continuous span behind its begin token; with its rows, where they are known."""
    held = layout_ranges(model.config)[name]
    ids = [held.start] * (held.num_tokens or 0) + ([] if held.end_id is None else [held.end_id])
    return prompt.then(torch.tensor(ids), None if rows is None else {name: rows})

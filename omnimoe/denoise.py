"""Tier 9: rows of a continuous modality drawn from noise, by a loop over ordinary forwards.

What stands before the drawn span does not see it under a causal rule, so its keys and values are computed once.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from omnimoe.inputs import InputError
from omnimoe.layers.masks import is_causal_rule, uncached_facts
from omnimoe.modalities import Patches
from omnimoe.model import OmniMoeForCausalLM


@torch.no_grad()
def denoise(
    model: OmniMoeForCausalLM,
    name: str,
    input_ids: Tensor,
    *,
    modality_ids: Tensor | None = None,
    attention_mask: Tensor | None = None,
    position_ids: Tensor | None = None,
    key_ids: Tensor | None = None,
    features: Mapping[str, Tensor] | None = None,
    drawn: Tensor | None = None,
    steps: int = 50,
    seed: int | None = None,
    noise: Tensor | None = None,
    guidance: float = 1.0,
    use_cache: bool | None = None,
) -> Tensor:
    """Draws rows of a continuous modality.

    Args:
        model: with the modality ``name``; put it in evaluation mode first.
        name: a :class:`~omnimoe.modalities.Patches` modality.
        input_ids: ``(B, T)`` int64, the whole layout; any id may stand at positions of a continuous modality.
        modality_ids: ``(B, T)`` int64; by the partition of the vocabulary where None.
        attention_mask: ``(B, T)``, 0 for padding.
        position_ids: ``(B, T)`` or ``(B, T, A)``; counted from the first token that is no padding where None.
        key_ids: ``(B, T)`` int64, for models whose copies are picked by other keys.
        features: clean rows of continuous modalities, ``(n, C)`` each, in order of batch and time. Those of ``name``
            are the rows that are given and not drawn.
        drawn: ``(B, T)`` bool, the positions to draw; all of ``name`` where None.
        steps: forwards through the model.
        seed: of the noise, on the model's device; None draws from the global generator.
        noise: ``(n, C)``, what to start from in place of ``seed``.
        guidance: scale of classifier-free guidance: with predictions c and u of a second forward that sees the begin of
            document and the drawn spans alone, ``u + guidance * (c - u)``; 1 does without.
        use_cache: keep what stands before the drawn rows. None does so where it changes nothing: under the mask rules
            causal and block_causal, with routers that look at one row at a time.

    Returns:
        ``(n, C)`` in the dtype of the model: the drawn rows, in order of batch and time.

    Raises:
        InputError: if there is no such modality, nothing to draw, or an argument does not fit the layout.

    Source: flow matching, https://arxiv.org/abs/2210.02747; DDIM, https://arxiv.org/abs/2010.02502; guidance,
    https://arxiv.org/abs/2207.12598.
    """
    config = model.config
    patches = _patches(model, name)
    if steps < 1:
        raise InputError(f"steps must be at least 1, got {steps}")
    if not 0 <= guidance < math.inf:
        raise InputError(f"guidance must be 0 or more, got {guidance}")
    if modality_ids is None:
        modality_ids = model.model.modality_ids_of(input_ids)
    if position_ids is None and attention_mask is not None:
        position_ids = (attention_mask.long().cumsum(1) - 1).clamp_min(0)
    valid = torch.ones_like(input_ids, dtype=torch.bool) if attention_mask is None else attention_mask.bool()
    mine = (modality_ids == config.modality_names.index(name)) & valid
    drawn = mine if drawn is None else drawn.bool()
    if bool((drawn & ~mine).any()) or not bool(drawn.any()):
        raise InputError(
            f"drawn must mark positions of {name!r}, and mark some; the layout has {int(mine.sum())} of them; "
            "pass modality_ids or the modality's placeholder_id in input_ids"
        )
    is_drawn = drawn[mine]
    rows = _start(patches, is_drawn, (features or {}).get(name), noise, seed, model)
    clean = {other: given for other, given in (features or {}).items() if other != name}

    cached = _can_keep(model) if use_cache is None else use_cache
    if cached and not _prefix_stands(config.mask):
        raise InputError(f"the mask rule {config.mask!r} lets a prefix see what follows; leave use_cache out")
    cut = _cut(model, modality_ids, drawn) if cached else 0
    layout = {"input_ids": input_ids, "modality_ids": modality_ids, "position_ids": position_ids, "key_ids": key_ids}
    placed = {
        other: ((modality_ids == config.modality_names.index(other)) & valid).nonzero()[:, 1]
        for other in [name, *clean]
    }

    def part(start: int, stop: int | None, times: Tensor) -> dict[str, Any]:
        """Arguments of a forward over some columns."""
        inside = {other: (at >= start) & (at < (stop or input_ids.shape[1])) for other, at in placed.items()}
        held = {other: given[inside[other]] for other, given in {**clean, name: rows}.items() if inside[other].any()}
        return {
            **{key: value[:, start:stop] for key, value in layout.items() if value is not None},
            "attention_mask": None if attention_mask is None else attention_mask[:, :stop],
            "features": held,
            "timesteps": {name: times[inside[name]]} if name in held else None,
        }

    cache = None
    if cut:
        cache = model.model(**part(0, cut, torch.zeros(len(rows), device=rows.device)), use_cache=True).past_key_values
    predicted = is_drawn[placed[name] >= cut]
    alone = None if guidance == 1 else _alone(model, name, layout, valid, drawn)
    grid = torch.linspace(1, 0, steps + 1).tolist()
    for time, next_time in itertools.pairwise(grid):
        times = is_drawn.to(torch.float32) * time
        out = model(**part(cut, None, times), past_key_values=cache, logits_to_keep=1)
        if cache is not None:
            cache.crop(cut - input_ids.shape[1])
        prediction = out.predictions[name][predicted]
        if alone is not None:
            lone = {"features": {name: rows[is_drawn]}, "timesteps": {name: times[is_drawn]}}
            plain = model(**alone, **lone, logits_to_keep=1).predictions[name]
            prediction = plain + guidance * (prediction - plain)
        rows[is_drawn] = patches.step(rows[is_drawn], prediction, time, next_time).to(rows.dtype)
    return rows[is_drawn]


def _patches(model: OmniMoeForCausalLM, name: str) -> Patches:
    modalities = model.model.modalities
    if name not in modalities or not isinstance(modalities[name], Patches):
        known = ", ".join(modalities) or "none"
        raise InputError(f"{name!r} is no continuous modality of the model; it has {known}; call generate for codes")
    return modalities[name]


def _start(
    patches: Patches, is_drawn: Tensor, known: Tensor | None, noise: Tensor | None, seed: int | None, model: nn.Module
) -> Tensor:
    """All rows of the modality: noise where they are drawn, what is known elsewhere."""
    count, channels = int(is_drawn.sum()), patches.config.channels
    rest = len(is_drawn) - count
    if (0 if known is None else len(known)) != rest:
        raise InputError(
            f"{rest} rows of {patches.config.name!r} are not drawn and need features, got "
            f"{0 if known is None else len(known)}; pass the clean rows, or mark all positions in drawn"
        )
    if noise is None:
        generator = None if seed is None else torch.Generator(model.device).manual_seed(seed)
        noise = torch.randn(count, channels, generator=generator, device=model.device)
    if tuple(noise.shape) != (count, channels):
        raise InputError(
            f"noise must be ({count}, {channels}), a row for each position drawn, got {tuple(noise.shape)}"
        )
    rows = torch.zeros(len(is_drawn), channels, device=model.device, dtype=model.dtype)
    rows[is_drawn] = noise.to(rows)
    if known is not None:
        rows[~is_drawn] = known.to(rows)
    return rows


def _alone(
    model: OmniMoeForCausalLM, name: str, layout: Mapping[str, Tensor | None], valid: Tensor, drawn: Tensor
) -> dict[str, Tensor]:
    """The layout without its condition: the begin of document, and the drawn spans with their boundary tokens."""
    config = model.config
    ids = layout["input_ids"]
    assert ids is not None
    held = next(part for part in config.modalities if part.name == name)
    kept = drawn.clone()
    # -1 is no token, so a boundary that the model lacks is found nowhere
    kept[:, :-1] |= drawn[:, 1:] & (ids[:, :-1] == (-1 if held.begin_id is None else held.begin_id))
    kept[:, 1:] |= drawn[:, :-1] & (ids[:, 1:] == (-1 if held.end_id is None else held.end_id))
    kept |= ids == (-1 if config.bos_token_id is None else config.bos_token_id)
    kept &= valid
    # what is kept moves to the right end of each row, in its order
    column = kept.long().argsort(dim=1, stable=True)[:, -int(kept.sum(1).max()) :]
    mask = kept.gather(1, column)
    time = (mask.long().cumsum(1) - 1).clamp_min(0)
    found = {"attention_mask": mask.long(), "position_ids": time}
    for key in ("input_ids", "modality_ids", "key_ids"):
        given = layout[key]
        if given is not None:
            found[key] = given.gather(1, column)
    given = layout["position_ids"]
    if given is not None and given.ndim == 3:
        # a run of columns moves as one, so that rows and columns stay where they are relative to its start
        old = given.expand(len(ids), -1, -1).gather(1, column.unsqueeze(-1).expand(-1, -1, given.shape[2]))
        starts = F.pad(column[:, 1:] != column[:, :-1] + 1, (1, 0), value=True)
        place = torch.arange(column.shape[1], device=column.device).expand_as(column)
        first = torch.where(starts, place, 0).cummax(dim=1).values
        moved = (old[..., 0] - time).gather(1, first)
        found["position_ids"] = (old - moved.unsqueeze(-1)).clamp_min(0)
    return found


def _can_keep(model: OmniMoeForCausalLM) -> bool:
    config = model.config
    return _prefix_stands(config.mask) and all(block.experts.is_causal for block in config.blocks)


def _prefix_stands(mask: str) -> bool:
    """Whether what stands before a whole block does not see it, and a cache keeps all that the rule reads."""
    return (is_causal_rule(mask) or mask == "block_causal") and not uncached_facts(mask)


def _cut(model: OmniMoeForCausalLM, modality_ids: Tensor, drawn: Tensor) -> int:
    """The last column before the drawn positions where no block of any row is cut in two."""
    config = model.config
    first = int(drawn.any(dim=0).nonzero()[0])
    whole = torch.ones(first + 1, dtype=torch.bool, device=modality_ids.device)
    if config.mask == "block_causal":
        blocked = torch.tensor([config.modality_names.index(name) for name in config.bidirectional_modalities])
        here = modality_ids[:, 1 : first + 1]
        goes_on = (here == modality_ids[:, :first]) & torch.isin(here, blocked.to(here))
        whole[1:] = ~goes_on.any(dim=0)
    return int(whole.nonzero()[-1])

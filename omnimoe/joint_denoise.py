"""Tier 9: rows of several continuous modalities drawn together, each step of all of them by one forward.

What stands before the first of them is computed once and kept. Guidance goes by a second condition with columns of its
own, such as words of what is not wanted; :func:`omnimoe.denoise` draws one modality and leaves out parts of the first.
"""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from omnimoe.inputs import InputError
from omnimoe.layers.masks import is_causal_rule, uncached_facts
from omnimoe.modalities import Patches
from omnimoe.model import OmniMoeForCausalLM

Step = Callable[[Tensor, Tensor, int], Tensor]
"""``(rows at a time, prediction, number of the step) -> rows at the next time``."""
_COLUMNS = ("input_ids", "modality_ids", "position_ids", "key_ids", "block_ids")


class EulerSampler:
    """Even steps of a flow, or of a modality's own schedule.

    Args:
        steps: forwards through the model.
        shift: how much longer it stays at noisy times: a time t of the even grid becomes ``s t / (1 + (s - 1) t)``.
    """

    def __init__(self, steps: int, shift: float = 1.0) -> None:
        if steps < 1 or not 0 < shift < math.inf:
            raise InputError(f"steps must be at least 1 and shift above 0 and finite, got {steps} and {shift}")
        even = torch.linspace(1, 0, steps + 1).tolist()
        self.times = [shift * time / (1 + (shift - 1) * time) for time in even]

    def stepper(self, patches: Patches) -> Step:
        """What a modality is stepped by."""
        pairs = list(itertools.pairwise(self.times))
        return lambda rows, prediction, index: patches.step(rows, prediction, *pairs[index])


class SchedulerSampler:
    """The steps of a scheduler of diffusers that predicts flows, such as ``UniPCMultistepScheduler``.

    Args:
        scheduler: as it is published; it is not changed.
        steps: forwards through the model.
        sigmas: the noise at each of them, where not the scheduler's own.
    """

    def __init__(self, scheduler: Any, steps: int, sigmas: Any = None) -> None:
        if steps < 1:
            raise InputError(f"steps must be at least 1, got {steps}")
        self.scheduler = copy.deepcopy(scheduler)
        self.scheduler.set_timesteps(steps, **({} if sigmas is None else {"sigmas": sigmas}))
        most = self.scheduler.config.num_train_timesteps
        self.times = [*(self.scheduler.timesteps.float() / most).tolist(), 0.0]

    def stepper(self, patches: Patches) -> Step:
        """What a modality is stepped by: a copy of the scheduler, which remembers earlier predictions."""
        mine = copy.deepcopy(self.scheduler)

        def step(rows: Tensor, prediction: Tensor, index: int) -> Tensor:
            made = mine.step(prediction[None].float(), mine.timesteps[index], rows[None], return_dict=False)
            return made[0].squeeze(0)

        return step


@torch.no_grad()
def denoise_jointly(
    model: OmniMoeForCausalLM,
    given: Mapping[str, Any],
    noisy: Mapping[str, Tensor],
    *,
    against: Mapping[str, Any] | None = None,
    scale: float = 1.0,
    sampler: EulerSampler | SchedulerSampler | None = None,
    noise: Mapping[str, Tensor] | None = None,
    held: Mapping[str, Tensor] | None = None,
    seed: int | None = None,
    use_cache: bool | None = None,
) -> dict[str, Tensor]:
    """Draws rows of several continuous modalities.

    Args:
        model: put it in evaluation mode first.
        given: what the model is called with: ``input_ids``, ``attention_mask``, ``position_ids`` and the like, and
            ``features`` of every continuous modality, of which the rows that are drawn may hold anything.
        noisy: of each modality that is drawn ``(n,)`` bool over its rows in order of batch and time, True where a row
            is drawn; the others are conditions.
        against: columns and features of a condition to stay away from, with the same rows drawn in the same order.
        scale: of guidance: with predictions c and u for the two, ``u + scale (c - u)``; 1 does without.
        sampler: times and steps; :class:`EulerSampler` of 35 steps where None.
        noise: rows to start from, ``(m, C)`` by modality, in the place of ``seed``.
        held: numbers of drawn rows that stay at 0, ``(m, C)`` bool by modality: channels that a machine does not have,
            cells beyond the edge of a picture.
        seed: of the noise, on the model's device; None draws from the global generator.
        use_cache: keep what stands before all drawn rows. None does so where that changes nothing.

    Returns:
        The drawn rows ``(m, C)`` of each modality, in float32.

    Raises:
        InputError: if a modality or an argument does not fit.
    """
    sampler = EulerSampler(35) if sampler is None else sampler
    if not math.isfinite(scale):
        raise InputError(f"scale must be finite, got {scale}")
    if scale != 1 and against is None:
        raise InputError(f"scale {scale} guides away from a second condition; pass against=, or leave scale 1")
    parts = {name: _patches(model, name) for name in noisy}
    fixed = {name: mask.to(model.device) for name, mask in (held or {}).items()}
    rows = {name: _start(model, parts[name], given, noisy, noise, seed, place) for place, name in enumerate(noisy)}
    cached = _can_keep(model) if use_cache is None else use_cache
    sides = [_Side(model, given, noisy, cached=cached)]
    if against is not None and scale != 1:
        sides.append(_Side(model, against, noisy, cached=cached))
    steppers = {name: sampler.stepper(parts[name]) for name in noisy}
    for name, mask in fixed.items():
        mine = noisy[name].to(model.device)
        rows[name][mine] = rows[name][mine].masked_fill(mask, 0)
    for index, time in enumerate(sampler.times[:-1]):
        found = [side(rows, time) for side in sides]
        for name, step in steppers.items():
            mine = noisy[name].to(rows[name].device)
            prediction = found[0][name][mine].float()
            if len(found) == 2:
                less = found[1][name][mine].float()
                prediction = less + scale * (prediction - less)
            if name in fixed:
                prediction = prediction.masked_fill(fixed[name], 0)
            rows[name][mine] = step(rows[name][mine], prediction, index)
    return {name: drawn[noisy[name].to(drawn.device)] for name, drawn in rows.items()}


class _Side:
    """Predictions under one condition, its columns before the drawn ones computed once."""

    def __init__(
        self, model: OmniMoeForCausalLM, given: Mapping[str, Any], noisy: Mapping[str, Tensor], *, cached: bool
    ) -> None:
        self.model, self.noisy = model, noisy
        ids = given["input_ids"]
        kinds = given.get("modality_ids")
        self.given = {**given, "modality_ids": model.model.modality_ids_of(ids) if kinds is None else kinds}
        self.features = dict(given.get("features") or {})
        self.length, self.cut, self.cache = ids.shape[1], 0, None
        if cached:
            self._keep()

    def _keep(self) -> None:
        """Puts what stands before every drawn modality into a cache, where nothing of theirs stands there too."""
        config, columns = self.model.config, self.given
        kinds, mask = columns["modality_ids"], columns.get("attention_mask")
        valid = torch.ones_like(kinds, dtype=torch.bool) if mask is None else mask.bool()
        late = torch.zeros_like(valid)
        for name in (*self.noisy, *config.bidirectional_modalities):
            late |= (kinds == config.modality_names.index(name)) & valid
        cut = int(late.any(0).nonzero()[0])
        stays = {name for name in self.features if bool((kinds[:, cut:] == config.modality_names.index(name)).any())}
        early = {name for name in self.features if bool((kinds[:, :cut] == config.modality_names.index(name)).any())}
        if not cut or early & stays:
            return
        before = {name: columns[name][:, :cut] for name in _COLUMNS if columns.get(name) is not None}
        known = {name: self.features[name] for name in early}
        out = self.model.model(**before, attention_mask=valid[:, :cut].long(), features=known or None, use_cache=True)
        self.cut, self.cache = cut, out.past_key_values
        after = {name: columns[name][:, cut:] for name in _COLUMNS if columns.get(name) is not None}
        self.given = {**after, "attention_mask": valid.long()}
        self.features = {name: held for name, held in self.features.items() if name in stays}

    def __call__(self, rows: Mapping[str, Tensor], time: float) -> dict[str, Tensor]:
        features, times = dict(self.features), {}
        for name, held in rows.items():
            features[name] = self.model.model.modalities[name].refilled(self.features[name], held)
            times[name] = self.noisy[name].to(held.device, torch.float32) * time
        columns = {name: self.given.get(name) for name in (*_COLUMNS, "attention_mask")}
        cache = self.cache if self.model.config.layer_types is None else copy.deepcopy(self.cache)
        none = torch.arange(0, device=self.model.device)  # no head over the vocabulary
        out = self.model(**columns, features=features, timesteps=times, past_key_values=cache, logits_to_keep=none)
        if self.cache is not None and cache is self.cache:  # from a state nothing can be taken back
            self.cache.crop(self.cut - self.length)
        return out.predictions


def _patches(model: OmniMoeForCausalLM, name: str) -> Patches:
    held = dict(model.model.modalities.items()).get(name)
    if not isinstance(held, Patches) or not held.has_row_times:
        known = [
            key for key, part in model.model.modalities.items() if isinstance(part, Patches) and part.has_row_times
        ]
        raise InputError(f"{name!r} has no rows with a time each, to be drawn with others; the model has {known}")
    return held


def _start(
    model: OmniMoeForCausalLM,
    patches: Patches,
    given: Mapping[str, Any],
    noisy: Mapping[str, Tensor],
    noise: Mapping[str, Tensor] | None,
    seed: int | None,
    place: int,
) -> Tensor:
    """All rows of a modality ``(n, C)`` float32: noise where they are drawn, what is given elsewhere."""
    name = patches.config.name
    if name not in (given.get("features") or {}):
        raise InputError(f"there are no features of {name!r}; pass its rows, those that are drawn too")
    rows = patches.rows_of(given["features"][name]).to(model.device, torch.float32, copy=True)
    mine = noisy[name]
    if mine.dtype != torch.bool or mine.shape != (len(rows),) or not bool(mine.any()):
        raise InputError(
            f"noisy[{name!r}] must be ({len(rows)},) bool, one for each row, and mark some, got {tuple(mine.shape)}"
        )
    count = int(mine.sum())
    start = None if noise is None else noise.get(name)
    if start is None:
        generator = None if seed is None else torch.Generator(model.device).manual_seed(seed + place)
        start = torch.randn(count, rows.shape[1], generator=generator, device=model.device)
    if tuple(start.shape) != (count, rows.shape[1]):
        raise InputError(f"noise[{name!r}] must be ({count}, {rows.shape[1]}), got {tuple(start.shape)}")
    rows[mine.to(rows.device)] = start.to(rows)
    return rows


def _can_keep(model: OmniMoeForCausalLM) -> bool:
    mask = model.config.mask
    stands = (is_causal_rule(mask) or mask == "block_causal") and not uncached_facts(mask)
    return stands and all(block.is_causal for block in model.config.blocks)


__all__ = ["EulerSampler", "SchedulerSampler", "denoise_jointly"]

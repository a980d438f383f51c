"""Tier 9: rows of a continuous modality drawn from noise, by a loop over ordinary forwards.

What stands before the drawn span does not see it under a causal rule, so its keys and values are computed once.
"""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from omnimoe.blocks import block_ids_of, block_positions
from omnimoe.guidance import Guidance, as_guidance
from omnimoe.inputs import InputError, check_whole
from omnimoe.layers.masks import is_causal_rule, uncached_facts
from omnimoe.layouts import Layout
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
    features: Mapping[str, Any] | None = None,
    drawn: Tensor | None = None,
    sizes: Sequence[tuple[int, int]] | None = None,
    steps: int = 50,
    shift: float = 1.0,
    seed: int | None = None,
    noise: Tensor | None = None,
    guidance: float | Guidance = 1.0,
    use_cache: bool | None = None,
) -> Tensor:
    """Draws rows of a continuous modality.

    Args:
        model: with the modality ``name``; put it in evaluation mode first.
        name: a :class:`~omnimoe.modalities.Patches` modality.
        input_ids: ``(B, T)`` int64, the whole layout; any id may stand at positions of a continuous modality.
        modality_ids: ``(B, T)`` int64; by the partition of the vocabulary where None.
        attention_mask: ``(B, T)``, 0 for padding.
        position_ids: ``(B, T)`` or ``(B, T, A)``; counted from the first token that is no padding, as
            ``config.positions`` says, where None.
        key_ids: ``(B, T)`` int64, for models whose copies are picked by other keys.
        features: clean rows of continuous modalities, ``(n, C)`` each, in order of batch and time, or in the form of
            its own that a modality takes. Those of ``name`` are the rows that are given and not drawn.
        drawn: ``(B, T)`` bool, the positions to draw; all of ``name`` where None.
        sizes: rows and columns of each picture that is drawn, for a modality of pictures; squares where None.
        steps: forwards through the model.
        shift: how much longer it stays at noisy times: a time t of the even grid becomes ``s t / (1 + (s - 1) t)``.
        seed: of the noise, on the model's device; None draws from the global generator.
        noise: ``(n, C)``, what to start from in place of ``seed``.
        guidance: scale of classifier-free guidance: with predictions c and u of a second forward that sees the begin of
            document and the drawn spans alone, ``u + guidance * (c - u)``; 1 does without. A
            :class:`~omnimoe.guidance.Guidance` leaves out parts of the condition one by one.
        use_cache: keep what stands before the drawn rows. None does so where it changes nothing: under the mask rules
            causal and block_causal, with routers that look at one row at a time.

    Returns:
        ``(n, C)`` in the dtype of the model: the drawn rows, in order of batch and time.

    Raises:
        InputError: if there is no such modality, nothing to draw, or an argument does not fit the layout.

    Source: flow matching, https://arxiv.org/abs/2210.02747; DDIM, https://arxiv.org/abs/2010.02502; guidance,
    https://arxiv.org/abs/2207.12598; the shift, https://arxiv.org/abs/2403.03206.
    """
    config = model.config
    patches = _patches(model, name)
    check_whole("steps", steps)
    if not 0 < shift < math.inf:
        raise InputError(f"shift must be above 0 and finite, got {shift}")
    guide = as_guidance(guidance)
    unknown = {name for names in guide.left_out for name in names or ()} - set(config.modality_names)
    if unknown:
        raise InputError(f"guidance without {sorted(unknown)}; the modalities are {', '.join(config.modality_names)}")
    if modality_ids is None:
        modality_ids = model.model.modality_ids_of(input_ids)
    valid = torch.ones_like(input_ids, dtype=torch.bool) if attention_mask is None else attention_mask.bool()
    mine = (modality_ids == config.modality_names.index(name)) & valid
    drawn = mine if drawn is None else drawn.bool()
    if bool((drawn & ~mine).any()) or not bool(drawn.any()):
        raise InputError(
            f"drawn must mark positions of {name!r}, and mark some; the layout has {int(mine.sum())} of them; "
            "pass modality_ids or the modality's placeholder_id in input_ids"
        )
    if position_ids is None:
        position_ids = (valid.long().cumsum(1) - 1).clamp_min(0)
        if config.positions == "blocks":
            position_ids = block_positions(block_ids_of(config, modality_ids, input_ids, drawn), valid)
    is_drawn = drawn[mine]
    given = (features or {}).get(name)
    shapes = _shapes(patches, mine, drawn, given, sizes) if patches.config.has_own_form else ()
    rows = _start(patches, is_drawn, None if given is None else patches.rows_of(given), noise, seed, model)
    columns = {"input_ids": input_ids, "modality_ids": modality_ids, "position_ids": position_ids}
    layout = Layout(
        config=config,
        name=name,
        columns=columns if key_ids is None else {**columns, "key_ids": key_ids},
        valid=valid,
        drawn=drawn,
        rows=torch.arange(len(rows), device=rows.device),
        shapes=shapes,
        features={other: held for other, held in (features or {}).items() if other != name},
    )
    cached = _can_keep(model) if use_cache is None else use_cache
    if cached and not _prefix_stands(config.mask):
        raise InputError(f"the mask rule {config.mask!r} lets a prefix see what follows; leave use_cache out")
    whole = _Prediction(model, layout, rows, is_cached=cached)
    others = {names: _Prediction(model, layout.without(names), rows, is_cached=cached) for names in guide.left_out}
    pictures = _pictures(drawn)
    grid = [shift * time / (1 + (shift - 1) * time) for time in torch.linspace(1, 0, steps + 1).tolist()]
    for time, next_time in itertools.pairwise(grid):
        times = is_drawn.to(torch.float32) * time
        prediction = whole(rows, times)
        if guide.holds_at(time):
            prediction = guide.combine(prediction, lambda names: others[names](rows, times), pictures)  # noqa: B023
        rows[is_drawn] = patches.step(rows[is_drawn], prediction, time, next_time).to(rows.dtype)
    return rows[is_drawn]


class _Prediction:
    """The head's output at the drawn rows of a layout, what stands before them computed once."""

    def __init__(self, model: OmniMoeForCausalLM, layout: Layout, rows: Tensor, *, is_cached: bool) -> None:
        self.model = model
        self.length = layout.valid.shape[1]
        self.cut = _cut(layout) if is_cached else 0
        self.cache: Any = None
        if self.cut:
            before = layout.between(0, self.cut).arguments(rows, torch.zeros(len(rows), device=rows.device))
            self.cache = model.model(**before, use_cache=True).past_key_values
        self.layout = layout.between(self.cut, None) if self.cut else layout
        self.drawn = self.layout.drawn[self.layout.held(layout.name)]

    def __call__(self, rows: Tensor, times: Tensor) -> Tensor:
        """``(n, C)`` rows and ``(n,)`` times to ``(m, C)``."""
        cache = self.cache if self.model.config.layer_types is None else copy.deepcopy(self.cache)
        none = torch.arange(0, device=rows.device)  # a head over a vocabulary takes longer than a layer
        out = self.model(**self.layout.arguments(rows, times), past_key_values=cache, logits_to_keep=none)
        if self.cache is not None and cache is self.cache:  # from a state nothing can be taken back
            self.cache.crop(self.cut - self.length)
        return out.predictions[self.layout.name][self.drawn]


def _shapes(
    patches: Patches, mine: Tensor, drawn: Tensor, given: Any, sizes: Sequence[tuple[int, int]] | None
) -> tuple[tuple[int, int], ...]:
    """Rows and columns of every picture of the modality, those that are given as they are."""
    starts = mine & ~F.pad(mine[:, :-1], (1, 0))
    span = (starts.flatten().cumsum(0).view_as(mine) - 1)[mine]
    counts = span.bincount().tolist()
    is_drawn = drawn[starts].tolist()
    if bool((drawn[mine] != drawn[starts][span]).any()):
        raise InputError(f"drawn must mark whole pictures of {patches.config.name!r}")
    known = iter([tuple(picture.shape[:2]) for picture in given] if given is not None else [])
    asked = None if sizes is None else iter([(int(tall), int(wide)) for tall, wide in sizes])
    found: list[tuple[int, int]] = []
    for count, wants in zip(counts, is_drawn, strict=True):
        side = round(count**0.5)
        shape = next(known, (0, 0)) if not wants else (side, side) if asked is None else next(asked, (0, 0))
        if shape[0] * shape[1] != count:
            raise InputError(
                f"picture {len(found)} of {patches.config.name!r} has {count} positions, and "
                f"{'sizes' if wants else 'its features'} make it {shape[0]} x {shape[1]}; pass sizes=[(rows, columns)] "
                "of the drawn ones and features of the others, in order of batch and time"
            )
        found.append((int(shape[0]), int(shape[1])))
    return tuple(found)


def _pictures(drawn: Tensor) -> Tensor:
    """``(n,)``, the run that each drawn position belongs to."""
    starts = drawn & ~F.pad(drawn[:, :-1], (1, 0))
    return (starts.flatten().cumsum(0).view_as(drawn) - 1)[drawn]


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


def _can_keep(model: OmniMoeForCausalLM) -> bool:
    config = model.config
    return _prefix_stands(config.mask) and all(block.is_causal for block in config.blocks)


def _prefix_stands(mask: str) -> bool:
    """Whether what stands before a whole block does not see it, and a cache keeps all that the rule reads."""
    return (is_causal_rule(mask) or mask == "block_causal") and not uncached_facts(mask)


def _cut(layout: Layout) -> int:
    """The last column before the drawn positions where no block and no picture of any row is cut in two."""
    config, kinds = layout.config, layout.columns["modality_ids"]
    first = int(layout.drawn.any(dim=0).nonzero()[0])
    whole = torch.ones(first + 1, dtype=torch.bool, device=kinds.device)
    blocks = torch.full_like(kinds, -1)
    if config.mask == "block_causal" and config.bidirectional_modalities:
        blocks = block_ids_of(config, kinds, layout.columns["input_ids"])
    own = torch.tensor([config.modality_names.index(name) for name in config.own_form], device=kinds.device)
    here, last = slice(1, first + 1), slice(0, first)
    goes_on = (blocks[:, here] == blocks[:, last]) & (blocks[:, here] != -1)
    goes_on |= (kinds[:, here] == kinds[:, last]) & torch.isin(kinds[:, here], own)
    whole[1:] = ~goes_on.any(dim=0)
    return int(whole.nonzero()[-1])

"""Which registered models weights could be of, told from their names and shapes."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch

from omnimoe.checkpoint.fit import layers_in
from omnimoe.checkpoint.header import Entry
from omnimoe.model import MODELS, OmniMoeConfig, OmniMoeForCausalLM

_TRIED = 8
"""Models that are built, on the meta device, after a first choice by width, depth and vocabulary; more where those are
the same."""


def closest_models(entries: Mapping[str, Entry], count: int = 3) -> list[tuple[str, int]]:
    """The registered models whose weights fit best.

    Args:
        entries: weights as declared.
        count: how many models.

    Returns:
        Names, and how many of their weights have the name and the shape of one that is declared; the best first, none
        of which nothing fits.

    Example:
        >>> model = OmniMoeForCausalLM(MODELS.get("mot_nano")())
        >>> declared = {name: Entry("F32", tuple(w.shape), 4 * w.numel()) for name, w in model.state_dict().items()}
        >>> closest_models(declared)[0][0]
        'mot_nano'
    """
    embedding = next((entry.shape for name, entry in entries.items() if name.endswith("embed_tokens.weight")), (1, 1))
    seen = (*embedding, max(1, layers_in(entries, "backbone")))

    def distance(name: str) -> float:
        config = MODELS.get(name)()
        sizes = (config.vocab_size, config.hidden_size, config.num_layers)
        return sum(abs(math.log(max(1, one) / max(1, other))) for one, other in zip(sizes, seen, strict=False))

    held = {(name, entry.shape) for name, entry in entries.items()}
    distances = {name: distance(name) for name in MODELS.names()}
    limit = sorted(distances.values())[:_TRIED][-1]
    tried = [name for name in sorted(distances, key=distances.__getitem__) if distances[name] <= limit]
    fits = {name: len(held & _shapes(MODELS.get(name)())) for name in tried}
    best = sorted((name for name in tried if fits[name]), key=lambda name: -fits[name])
    return [(name, fits[name]) for name in best[:count]]


def _shapes(config: OmniMoeConfig) -> set[tuple[str, tuple[int, ...]]]:
    with torch.device("meta"):
        model = OmniMoeForCausalLM(config)
    return {(name, tuple(tensor.shape)) for name, tensor in model.state_dict().items()}

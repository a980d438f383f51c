"""Tiny seeds of every family, and of our own kinds of models."""

from __future__ import annotations

import functools
import tempfile

import torch

from omnimoe import from_pretrained
from omnimoe.model import OmniMoeForCausalLM
from tests.declarations import DECLARATIONS, DENSE, TEXT, build
from tests.zoo.seeds.tiny import CASES, publish, published_model

PUBLISHED = sorted(CASES)

_ALONE = DENSE.replace(modalities=(TEXT,))
OWN = {
    "text": _ALONE,
    "text_tied": _ALONE.replace(tie_word_embeddings=True),
    "text_post": _ALONE.replace(norm_placement="post"),
    **{name: DECLARATIONS[name] for name in ("dense", "mot", "merged", "moe", "static", "moma_top_k")},
}


@functools.cache
def seed_of(name: str) -> OmniMoeForCausalLM:
    """The seed; not to be changed."""
    if name in OWN:
        return build(OWN[name])
    with tempfile.TemporaryDirectory() as folder:
        return from_pretrained(publish(published_model(name), folder))


def text_of(model: OmniMoeForCausalLM, *, seed: int = 0) -> torch.Tensor:
    """Ids of text."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(8, model.config.token_ranges["text"].stop, (2, 11), generator=generator)


__all__ = ["OWN", "PUBLISHED", "seed_of", "text_of"]

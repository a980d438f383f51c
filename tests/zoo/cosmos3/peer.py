"""Cosmos3 and the implementations it is published with at width 512 and 8 layers, for timing side by side."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from omnimoe.convert import to_published
from tests.zoo.cosmos3 import tiny
from tests.zoo.cosmos3.tiny import Sample, Scene, asked, batch

PROMPT, CLIP = 256, (2, 8, 8)
SIZES = {
    "hidden_size": 512,
    "intermediate_size": 1408,
    "head_dim": 64,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "num_hidden_layers": 8,
    "rope_scaling": {"mrope_section": [12, 10, 10]},
    "vocab_size": 32_000,
}


@torch.no_grad()
def cases(kind: str = "cosmos3_omni") -> dict[str, tuple[Callable[[], Tensor], Callable[[], Tensor]]]:
    """Ours and theirs for a prompt, a token more, and a step of drawing: diffusers computes the words in each step.

    Args:
        kind: ``"cosmos3_omni"`` or ``"cosmos3_edge"``.
    """
    plain = {kind: {**tiny.TRANSFORMER_OF[kind], **SIZES}}
    root = copy.deepcopy(tiny.ROOT_OF)
    root[kind]["vision_config"]["out_hidden_size"] = SIZES["hidden_size"]
    with mock.patch.object(tiny, "TRANSFORMER_OF", plain), mock.patch.object(tiny, "ROOT_OF", root):
        model = tiny.make_model(kind, std=0.02)
        with tempfile.TemporaryDirectory() as folder:
            to_published(model, Path(folder) / "cosmos3")
            reader = tiny.reasoner(kind, Path(folder) / "cosmos3")
            drawer = tiny.generator(kind, Path(folder) / "cosmos3")
    draw = torch.Generator().manual_seed(1)
    ids = torch.randint(200, 32_000, (1, PROMPT), generator=draw)
    latent = torch.randn(3, CLIP[0], 2 * CLIP[1], 2 * CLIP[2], generator=draw)
    sample = Sample(Scene(ids=ids[0].tolist(), video=CLIP), latent=latent, noisy=list(range(CLIP[0])))
    given, theirs = batch(model, [sample]), asked(sample)
    caches = [held(ids, use_cache=True).past_key_values for held in (model, reader)]
    place = torch.tensor([[PROMPT]])

    def token(held: Any, cache: Any, **options: Any) -> Tensor:
        logits = held(ids[:, -1:], past_key_values=cache, use_cache=True, **options).logits
        cache.crop(-1)
        return logits

    def step() -> Tensor:
        rest = {name: given[name][:, PROMPT:] for name in ("input_ids", "modality_ids", "position_ids")}
        parts = {name: given[name] for name in ("features", "timesteps", "attention_mask")}
        out = model(**rest, **parts, past_key_values=caches[0], logits_to_keep=torch.arange(0))
        caches[0].crop(-rest["input_ids"].shape[1])
        return tiny.to_latent(out.predictions["video"].view(*CLIP, -1))

    return {
        "prefill": (
            lambda: model(ids, use_cache=True, logits_to_keep=1).logits,
            lambda: reader(input_ids=ids, use_cache=True, logits_to_keep=1).logits,
        ),
        "decode": (
            lambda: token(model, caches[0], position_ids=place.expand(1, 1)),
            lambda: token(reader, caches[1], position_ids=place.expand(3, 1, 1)),
        ),
        "step": (step, lambda: drawer(**theirs).sample[0][0]),
    }

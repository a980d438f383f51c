"""ERNIE-4.5-VL beside transformers' own at a size that takes time: equal weights, and one batch for both."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from omnimoe import OmniMoeForCausalLM, from_pretrained
from tests.zoo.ernie4_5_vl.tiny import Part, batches, publish, reference

TEXT = {
    "vocab_size": 32_000,
    "hidden_size": 512,
    "intermediate_size": 1408,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "moe_num_experts": 16,
    "moe_intermediate_size": [352, 128],
    "moe_k": 4,
    "max_position_embeddings": 4096,
    "rope_parameters": {"rope_type": "default", "rope_theta": 500_000.0, "mrope_section": [11, 11, 10]},
}
VISION = {"depth": 2, "hidden_size": 256, "intermediate_size": 1024, "num_heads": 4, "patch_size": 14}
DOCUMENT: tuple[Part, ...] = (48, (1, 16, 16), 40, (1, 16, 16), 36)
"""124 words around two pictures of 64 rows each."""


@dataclass(frozen=True, kw_only=True)
class Pair:
    """Two models with equal weights, and the batch as either takes it.

    Args:
        ours: the model here.
        theirs: transformers'.
        given: to ours.
        other: to theirs; with ``past_key_values`` it wants positions of its own, which ``theirs.generate`` finds.
    """

    ours: OmniMoeForCausalLM
    theirs: Any
    given: dict[str, Any]
    other: dict[str, Any]


def make_pair(
    documents: tuple[tuple[Part, ...], ...] = (DOCUMENT,),
    *,
    attention: str = "sdpa",
    dtype: torch.dtype = torch.float32,
) -> Pair:
    """The pair at a width of 512 and 8 layers.

    Args:
        documents: of the batch.
        attention: what both attend with.
        dtype: that both are loaded in; routers stay in float32.
    """
    theirs = reference(TEXT, VISION)
    with torch.no_grad():
        for name, tensor in theirs.named_parameters():
            if tensor.ndim > 1 and "e_score" not in name:
                tensor.mul_(0.1)
    options: dict[str, Any] = {"attn_implementation": attention, "dtype": dtype}
    with tempfile.TemporaryDirectory() as folder:
        ours = from_pretrained(publish(theirs, Path(folder)), **options)
        theirs = type(theirs).from_pretrained(folder, **options)
    given, other = batches(ours, documents)
    return Pair(ours=ours, theirs=theirs, given=given, other=other)

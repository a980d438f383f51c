"""Chameleon beside transformers' own at a size that takes time: equal weights, and one batch for both."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import ChameleonForConditionalGeneration

from omnimoe import OmniMoeForCausalLM, from_pretrained
from tests.zoo.chameleon.tiny import CELLS, FIRST_CODE, NUM_CODES, publish, published_model

SIZES = {"hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 8, "num_attention_heads": 8}
BEGIN, END = 37, 36


@dataclass(frozen=True, kw_only=True)
class Pair:
    """Two models with equal weights.

    Args:
        ours: the model here.
        theirs: transformers'.
        ids: ``(B, T)`` int64 for both: words and pictures in turn, codes where pictures stand.
    """

    ours: OmniMoeForCausalLM
    theirs: ChameleonForConditionalGeneration
    ids: Tensor


def make_pair(
    form: str = "7b",
    *,
    batch_size: int = 1,
    length: int = 256,
    attention: str = "sdpa",
    dtype: torch.dtype = torch.float32,
) -> Pair:
    """The pair at a width of 512 and 8 layers.

    Args:
        form: a key of :data:`tests.zoo.chameleon.tiny.FORMS`.
        batch_size: B.
        length: T.
        attention: what both attend with.
        dtype: of both.
    """
    heads = {"7b": 8, "34b": 2}[form]
    theirs = published_model(form, **SIZES, num_key_value_heads=heads, max_position_embeddings=4096)
    with torch.no_grad():
        for name, tensor in theirs.named_parameters():
            if "norm" not in name and ".vqmodel." not in name:
                tensor.mul_(0.1)
    theirs.set_attn_implementation(attention)
    with tempfile.TemporaryDirectory() as folder:
        publish(theirs, Path(folder))
        ours = from_pretrained(folder, attn_implementation=attention, dtype=dtype)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(40, 290, (batch_size, length), generator=generator)
    step = CELLS + 2
    for start in range(8, length - step, 2 * step):
        ids[:, start], ids[:, start + step - 1] = BEGIN, END
        ids[:, start + 1 : start + step - 1] = FIRST_CODE + torch.randint(
            NUM_CODES, (batch_size, CELLS), generator=generator
        )
    return Pair(ours=ours, theirs=theirs.to(dtype), ids=ids)

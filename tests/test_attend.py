"""Attention implementations beyond our own: what each is handed, under every mask rule that it has."""

from __future__ import annotations

import importlib.util
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from omnimoe.attend import attention_function
from omnimoe.layers import MASK_RULES, Attention, AttentionMask
from omnimoe.layers.attention import eager
from tests.declarations import DECLARATIONS, build, ids_like

VALID = torch.tensor([[False] * 2 + [True] * 7, [True] * 6 + [False] * 3])
SEGMENTS = torch.tensor([[0] * 4 + [1] * 5, [0] * 2 + [1] * 5 + [-1] * 2])


def varlen(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **given: Any):
    """What flash attention is documented to do with documents that lie one behind the other, in plain operations."""
    assert mask is None or mask.ndim == 2
    ends = given.get("cu_seq_lens_q")
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    spans = [(0, query.shape[2])] if ends is None else list(zip(ends[:-1].tolist(), ends[1:].tolist(), strict=True))
    assert ends is None or max(stop - start for start, stop in spans) == given["max_length_q"]
    out = torch.zeros_like(query)
    for start, stop in spans:
        keys, values = (key, value) if ends is None else (key[:, :, start:stop], value[:, :, start:stop])
        scores = query[:, :, start:stop] @ keys.transpose(2, 3) * given["scaling"]
        seen = torch.ones_like(scores, dtype=torch.bool)
        if given["is_causal"]:  # the last query sees the last key
            seen = seen.tril(keys.shape[2] - (stop - start))
        if mask is not None:
            seen = seen & mask[:, None, None]
        out[:, :, start:stop] = scores.masked_fill(~seen, float("-inf")).softmax(-1) @ values
    return out.transpose(1, 2), None


def parts(rule: str, padded: bool, packed: bool):
    module = Attention.Config(num_heads=4, num_kv_heads=2, rope=None).build(
        hidden_size=32, num_modalities=3, layer_idx=0
    )
    mask = AttentionMask(
        rule=rule,
        query_length=9,
        key_length=9,
        past_length=0,
        device=torch.device("cpu"),
        valid=VALID & (SEGMENTS >= 0) if padded and packed else VALID if padded else None,
        segment_ids=SEGMENTS if packed else None,
        key_ids=torch.randint(0, 3, (2, 9)),
    )
    return module, (torch.randn(2, 4, 9, 8), torch.randn(2, 2, 9, 8), torch.randn(2, 2, 9, 8)), mask


@pytest.mark.parametrize("rule", ["causal", "bidirectional"])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("packed", [False, True])
def test_flash_attention_gets_documents_without_padding(rule, padded, packed):
    module, operands, mask = parts(rule, padded, packed)
    attend = attention_function("flash_attention_2", lambda name, default: varlen)
    operands = [part.double() for part in operands]
    found, wanted = attend(module, *operands, mask)[0], eager(module, *operands, mask)[0]
    real = torch.ones(2, 9, dtype=torch.bool) if mask.valid is None else mask.valid
    torch.testing.assert_close(found[real], wanted[real])
    assert not found[~real].any()


@pytest.mark.parametrize("rule", sorted(set(MASK_RULES.names()) - {"causal", "bidirectional"}))
def test_flash_attention_refuses_rules_that_it_does_not_have(rule):
    module, operands, mask = parts(rule, False, False)
    attend = attention_function("flash_attention_2", lambda name, default: varlen)
    with pytest.raises(ValueError, match=f"cannot express the mask rule '{rule}', only causal and bidirectional"):
        attend(module, *operands, mask)


def test_flash_attention_refuses_float32_unless_autocast_says_otherwise():
    module, operands, mask = parts("causal", False, False)
    attend = attention_function("flash_attention_2", lambda name, default: varlen)
    with pytest.raises(ValueError, match="'flash_attention_2' computes in bfloat16.*load it with dtype=torch.bfloat16"):
        attend(module, *operands, mask)
    with torch.autocast("cpu", torch.bfloat16):
        assert attend(module, *operands, mask)[0].shape == (2, 9, 4, 8)


@pytest.mark.parametrize("kind", ["dense", "mot"])
@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_flash_attention_decodes_left_padded_prompts(kind, cache, monkeypatch):
    model = build(DECLARATIONS[kind])
    ids = ids_like(DECLARATIONS[kind])[:, :8]
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    settings = {
        "attention_mask": mask, "max_new_tokens": 4, "do_sample": False, "cache_implementation": cache
    }  # fmt: skip
    wanted = model.generate(ids, **settings)
    ALL_ATTENTION_FUNCTIONS.register("our_flash", varlen)
    monkeypatch.setattr(model.config, "_attn_implementation_internal", "our_flash")
    assert torch.equal(model.generate(ids, **settings), wanted)


@pytest.mark.parametrize(
    ("name", "package", "remedy"),
    [("xformers", "xformers", r"install omnimoe\[xformers\]"), ("flash_attention_2", "flash_attn", "install one of")],
)
def test_a_missing_package_is_told_when_it_is_chosen(name, package, remedy):
    if any(importlib.util.find_spec(held) for held in (package, *(("kernels",) if "flash" in name else ()))):
        pytest.skip(f"{package} is installed")
    model = build(DECLARATIONS["dense"])
    before = model.config._attn_implementation
    with pytest.raises(ImportError, match=f"{name!r} needs the package {package}.*{remedy}.* or take 'sdpa'"):
        model.set_attn_implementation(name)
    assert model.config._attn_implementation == before


def test_an_unknown_implementation_is_refused_and_nothing_changes():
    model = build(DECLARATIONS["dense"])
    before = model.config._attn_implementation
    with pytest.raises(ValueError, match="lightning"):
        model.set_attn_implementation("lightning")
    assert model.config._attn_implementation == before

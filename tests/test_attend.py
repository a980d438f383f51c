"""Attention implementations beyond our own: what each is handed, under every mask rule that it has."""

from __future__ import annotations

import importlib.machinery
import importlib.util
import sys
import types
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoModelForCausalLM
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from omnimoe.attend import attention_function
from omnimoe.layers import MASK_RULES, Attention, AttentionMask
from omnimoe.layers.attention import eager
from omnimoe.model import OmniMoeForCausalLM
from omnimoe.registry import RegistryError
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


def in_plain(query: Tensor, key: Tensor, value: Tensor, attn_bias: Tensor | None = None, **given: Any) -> Tensor:
    """What xformers is documented to do and to ask for, in plain operations."""
    assert query.ndim == 4
    assert query.shape[0::2] == key.shape[0::2]
    assert key.shape == value.shape
    query, key, value = (part.transpose(1, 2) for part in (query, key, value))
    scores = query @ key.transpose(2, 3) * given["scale"]
    if attn_bias is not None:
        assert attn_bias.shape == scores.shape
        assert attn_bias.dtype == query.dtype
        assert attn_bias.stride(3) == 1
        assert attn_bias.stride(2) % 8 == 0
        scores = scores + attn_bias
    return (scores.softmax(-1) @ value).transpose(1, 2)


@pytest.fixture
def xformers(monkeypatch) -> None:
    """xformers with an operator for the CPU; where it is not installed, a stand-in of it."""
    if importlib.util.find_spec("xformers") is None:
        for name in ("xformers", "xformers.ops"):
            module = types.ModuleType(name)
            module.__spec__ = importlib.machinery.ModuleSpec(name, None)
            monkeypatch.setitem(sys.modules, name, module)
        monkeypatch.setattr(sys.modules["xformers.ops"], "memory_efficient_attention", in_plain, False)
        return
    from xformers.ops import fmha

    class OnCPU(fmha.cutlass.FwOp):
        SUPPORTED_DEVICES = {"cpu"}

        @classmethod
        def apply(cls, inp, needs_gradient):
            bias = {} if inp.attn_bias is None else {"attn_bias": inp.attn_bias}
            return in_plain(inp.query, inp.key, inp.value, scale=inp.scale_float, **bias), None

    def dispatch(inp, needs_gradient):
        assert OnCPU.not_supported_reasons(inp) == []
        return OnCPU

    monkeypatch.setattr(fmha, "_dispatch_fw", dispatch)


@pytest.fixture
def flex_attention() -> Iterator[None]:
    """The library's own operator, not compiled: that takes a minute for each mask."""
    with warnings.catch_warnings(), torch.compiler.set_stance("force_eager"):
        warnings.filterwarnings("ignore", message="flex_attention called without torch.compile")
        yield


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
        block_ids=torch.tensor([[0, 0, 0, -1, 1, 1, -1, 2, -1], [0, 0, -1, -1, 3, 3, 3, -2, -2]]),
    )
    return module, (torch.randn(2, 4, 9, 8), torch.randn(2, 2, 9, 8), torch.randn(2, 2, 9, 8)), mask


@pytest.mark.parametrize("rule", sorted(MASK_RULES.names()))
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("name", ["flex_attention", "xformers"])
def test_every_rule_under_every_implementation(name, rule, padded, packed, request):
    request.getfixturevalue(name)
    module, operands, mask = parts(rule, padded, packed)
    attend = attention_function(name, ALL_ATTENTION_FUNCTIONS.get_interface)
    with torch.no_grad():
        torch.testing.assert_close(attend(module, *operands, mask)[0], eager(module, *operands, mask)[0])


@pytest.mark.parametrize("kind", ["dense", "merged", "moe", "one_way", "block_causal", "encoder"])
@pytest.mark.parametrize("name", ["eager", "flex_attention", "xformers"])
def test_models_give_the_same_under_every_implementation(name, kind, request):
    model, ids = build(DECLARATIONS[kind]), ids_like(DECLARATIONS[kind])
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    with torch.no_grad():
        wanted = model(ids, attention_mask=mask).logits
        if name != "eager":
            request.getfixturevalue(name)
        model.set_attn_implementation(name)
        assert model.config._attn_implementation == name
        torch.testing.assert_close(model(ids, attention_mask=mask).logits, wanted, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("name", ["eager", "flex_attention", "xformers"])
def test_models_generate_the_same_under_every_implementation(name, cache, request):
    model, ids = build(DECLARATIONS["mot"]), ids_like(DECLARATIONS["mot"])[:, :8]
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    settings = {"attention_mask": mask, "max_new_tokens": 4, "do_sample": False, "cache_implementation": cache}
    wanted = model.generate(ids, **settings)
    if name != "eager":
        request.getfixturevalue(name)
    model.set_attn_implementation(name)
    assert torch.equal(model.generate(ids, **settings), wanted)


@pytest.mark.slow
def test_flex_attention_is_part_of_a_graph():
    torch._dynamo.reset()
    model, ids = build(DECLARATIONS["block_causal"]).requires_grad_(False), ids_like(DECLARATIONS["block_causal"])
    wanted = model(ids).logits
    model.set_attn_implementation("flex_attention")
    found = torch.compile(model, fullgraph=True, backend="eager")(ids).logits
    torch.testing.assert_close(found, wanted, atol=2e-5, rtol=1e-4)


@pytest.mark.slow
def test_flex_attention_compiles():
    model, ids = build(DECLARATIONS["block_causal"]), ids_like(DECLARATIONS["block_causal"])
    with torch.no_grad():
        wanted = model(ids).logits
        model.set_attn_implementation("flex_attention")
        torch.testing.assert_close(model(ids).logits, wanted, atol=2e-5, rtol=1e-4)


def test_xformers_without_an_operator_says_so_in_a_sentence(xformers, monkeypatch):
    def none(*given, **named):
        raise NotImplementedError("No operator found\nfor many reasons")

    monkeypatch.setattr(sys.modules["xformers.ops"], "memory_efficient_attention", none)
    model, ids = build(DECLARATIONS["dense"]), ids_like(DECLARATIONS["dense"])
    model.set_attn_implementation("xformers")
    with pytest.raises(ValueError, match=r"^xformers has no operator for torch.float32 queries \(2, 12, 4, 4\) on cpu"):
        model(ids)


@pytest.mark.parametrize("rule", ["causal", "bidirectional"])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("packed", [False, True])
def test_flash_attention_gets_documents_without_padding(rule, padded, packed):
    module, operands, mask = parts(rule, padded, packed)
    attend = attention_function("our_flash", lambda name, default: varlen)
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
    module, _, mask = parts("causal", False, False)
    attend = attention_function("flash_attention_2", lambda name, default: varlen)
    with FakeTensorMode():  # shapes on a GPU that need not be there
        operands = [torch.randn(2, heads, 9, 8, device="cuda") for heads in (4, 2, 2)]
        with pytest.raises(ValueError, match="'flash_attention_2' computes in bfloat16.*load it with dtype=torch.bfl"):
            attend(module, *operands, mask)
        torch.set_autocast_enabled("cuda", True)
        try:
            assert attend(module, *operands, mask)[0].shape == (2, 9, 4, 8)
        finally:
            torch.set_autocast_enabled("cuda", False)


def test_flash_attention_refuses_the_cpu():
    module, operands, mask = parts("causal", False, False)
    attend = attention_function("flash_attention_2", lambda name, default: varlen)
    for dtype in (torch.float32, torch.bfloat16):
        with pytest.raises(ValueError, match="^'flash_attention_2' computes on GPUs, and the model is on the CPU; "):
            attend(module, *(part.to(dtype) for part in operands), mask)


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


@pytest.mark.parametrize("name", ["lightning", "SDPA", "", 3])
def test_an_unknown_implementation_is_refused_and_nothing_changes(name, tmp_path):
    model = build(DECLARATIONS["dense"])
    before = model.config._attn_implementation
    message = f'`attn_implementation="{name}"` is not supported; there are eager, .*flex_attention, .*sdpa, xformers'
    with pytest.raises(RegistryError, match=message):
        model.set_attn_implementation(name)
    assert model.config._attn_implementation == before
    model.save_pretrained(tmp_path)
    for kind in (OmniMoeForCausalLM, AutoModelForCausalLM):
        with pytest.raises(RegistryError, match=message):
            kind.from_pretrained(tmp_path, attn_implementation=name)

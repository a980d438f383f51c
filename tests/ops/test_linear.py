"""One matrix for all rows: what it is, who computes it, and what keeps PyTorch's own."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import omnimoe
from omnimoe.layers import Attention, AttentionMask, Head
from omnimoe.layers.attention import scaled_dot_product
from omnimoe.ops import linear
from omnimoe.ops._backends import FEW_ROWS, has_tiles, suits_kernels
from omnimoe.ops.linear import IMPLEMENTATIONS, KERNELS_FIRST, cpp

TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("shape", [(1, 5), (3, 16), (2, 7, 33), (0, 4), (2, 0, 4)], ids=str)
@pytest.mark.parametrize("has_bias", [False, True])
def test_the_kernel_gives_the_product_in_float64(compiled, dtype, shape, has_bias):
    x, weight = torch.randn(shape).to(dtype), torch.randn(9, shape[-1]).to(dtype)
    bias = torch.randn(9).to(dtype) if has_bias else None
    found = cpp.linear(x, weight, bias)
    exact = F.linear(x.double(), weight.double(), None if bias is None else bias.double())
    assert found.dtype == dtype
    torch.testing.assert_close(found.double(), exact, atol=4 * TOLERANCE[dtype], rtol=TOLERANCE[dtype])


def test_a_kernels_gradients(compiled):
    given = (torch.randn(3, 4, dtype=torch.float64), torch.randn(5, 4, dtype=torch.float64), torch.randn(5).double())
    assert torch.autograd.gradcheck(cpp.linear, [tensor.requires_grad_() for tensor in given])


def test_with_gradients_it_is_pytorchs_to_the_bit():
    x, layer = torch.randn(5, 33), Head(33, 70)
    assert torch.equal(layer(x), F.linear(x, layer.weight, layer.bias))


@pytest.mark.parametrize(
    ("dtype", "rows", "is_ours"),
    [(torch.float32, 1000, True), (torch.bfloat16, FEW_ROWS, True), (torch.bfloat16, FEW_ROWS + 1, False)],
)
def test_where_kernels_are_taken(dtype, rows, is_ours):
    x = torch.empty(rows, 2, dtype=dtype)
    assert not suits_kernels(x)
    with torch.no_grad():
        assert suits_kernels(x) == is_ours
        assert not suits_kernels(x.to("meta"))
        assert suits_kernels(x, is_bank=True) == (is_ours or not has_tiles())


def test_a_split_or_quantised_weight_keeps_its_own_product(compiled):
    class Split(torch.Tensor):
        pass

    (ours,) = (one for one in KERNELS_FIRST if one.backend == "cpp")
    x, weight = torch.randn(2, 3), torch.randn(4, 3)
    assert ours.why_not(x, weight, None) == ""
    assert "no plain tensor" in ours.why_not(x, weight.as_subclass(Split), None)
    assert "does not fit" in ours.why_not(x, weight.double(), None)
    with torch.autocast("cpu", torch.bfloat16):
        assert "autocast" in ours.why_not(x, weight, None)
        with torch.no_grad():
            assert linear(x, weight).dtype == torch.bfloat16


def test_what_is_asked_for_is_used(compiled):
    x, weight = torch.randn(2, 300), torch.randn(4, 300)
    with omnimoe.backend("cpp"):
        assert torch.equal(linear(x, weight), cpp.linear(x, weight, None))
    with torch.no_grad(), omnimoe.backend("torch"):
        assert torch.equal(linear(x, weight), F.linear(x, weight))
    assert [one.backend for one in IMPLEMENTATIONS] == ["torch", "cpp", "reference"]


@pytest.mark.parametrize("is_padded", [False, True])
def test_one_query_reads_shared_keys_where_they_lie(is_padded):
    part = Attention.Config(num_heads=6, num_kv_heads=2, head_dim=4).build(
        hidden_size=24, num_modalities=1, layer_idx=0
    )
    query, key, value = torch.randn(2, 6, 1, 4), torch.randn(2, 2, 5, 4), torch.randn(2, 2, 5, 4)
    valid = torch.ones(2, 5, dtype=torch.bool)
    valid[1, :2] = not is_padded
    mask = AttentionMask(
        rule="causal", query_length=1, key_length=5, past_length=4, device=query.device,
        valid=valid if is_padded else None, key_ids=torch.zeros(2, 1, dtype=torch.int64),
    )  # fmt: skip
    found, _ = scaled_dot_product(part, query, key, value, mask)
    copied = [held.repeat_interleave(3, dim=1) for held in (key, value)]
    seen = valid.view(2, 1, 1, 5)
    torch.testing.assert_close(
        found, F.scaled_dot_product_attention(query, *copied, attn_mask=seen, scale=part.scaling).transpose(1, 2)
    )

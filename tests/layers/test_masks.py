"""Mask rules: one definition, read as a dense mask, as a block mask and by a predicate on single positions."""

from __future__ import annotations

import pytest
import torch
from torch.nn.attention.flex_attention import flex_attention

from omnimoe.layers import MASK_RULES, Attention, AttentionMask, register_mask_rule
from omnimoe.layers.attention import eager, scaled_dot_product
from omnimoe.layers.masks import is_causal_rule, uncached_facts

RULES = ("causal", "bidirectional", "block_causal", "prefix", "one_way")
LENGTH = 9


def may_see(rule: str, q: int, k: int, keys: list[int], blocks: list[int]) -> bool:
    """The rules again, for one pair of positions."""
    if rule == "causal":
        return k <= q
    if rule == "bidirectional":
        return True
    if rule == "block_causal":
        if blocks[k] != -1 and blocks[k] == blocks[q]:
            return True
        return k <= q and blocks[k] >= -1
    if rule == "prefix":
        return k <= q or blocks[k] == 0
    return k <= q and keys[k] <= keys[q]


KEYS = torch.tensor([[0, 1, 1, 0, 2, 2, 0, 1, 0], [2, 2, 0, 0, 1, 1, 1, 0, 2]])
BLOCKS = torch.tensor([[0, 0, 0, -1, 1, 1, -1, 2, -1], [0, 0, -1, -1, 3, 3, 3, -2, -2]])
VALID = torch.tensor([[False] * 2 + [True] * 7, [True] * 6 + [False] * 3])
SEGMENTS = torch.tensor([[0] * 4 + [1] * 5, [0] * 2 + [1] * 5 + [-1] * 2])


def mask_of(rule: str, *, padded: bool = False, packed: bool = False, past: int = 0) -> AttentionMask:
    return AttentionMask(
        rule=rule,
        query_length=LENGTH - past,
        key_length=LENGTH,
        past_length=past,
        device=torch.device("cpu"),
        valid=VALID if padded else None,
        segment_ids=SEGMENTS if packed else None,
        key_ids=KEYS[:, past:],
        block_ids=BLOCKS[:, past:],
    )


def wanted_mask(rule: str, padded: bool, packed: bool) -> torch.Tensor:
    wanted = torch.zeros(2, LENGTH, LENGTH, dtype=torch.bool)
    for b in range(2):
        keys, blocks = KEYS[b].tolist(), BLOCKS[b].tolist()
        for q in range(LENGTH):
            for k in range(LENGTH):
                seen = may_see(rule, q, k, keys, blocks)
                seen = seen and (not packed or bool(SEGMENTS[b, q] == SEGMENTS[b, k]))
                seen = seen and (not padded or bool(VALID[b, k]))
                wanted[b, q, k] = seen or (padded and q == k)
    return wanted


def test_every_rule_that_ships_is_tested_here():
    assert set(RULES) == set(MASK_RULES.names())


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("packed", [False, True])
def test_dense_and_block_masks_are_what_the_predicate_says(rule, padded, packed):
    mask, wanted = mask_of(rule, padded=padded, packed=packed), wanted_mask(rule, padded, packed)
    assert torch.equal(mask.dense().squeeze(1).expand_as(wanted), wanted)
    block = mask.flex()
    for b, q, k in torch.randint(0, LENGTH, (25, 3)).tolist():
        indices = [torch.tensor(index) for index in (b % 2, 0, q, k)]
        assert bool(block.mask_mod(*indices)) == bool(wanted[b % 2, q, k])
    low = torch.finfo(torch.float32).min
    assert torch.equal(mask.additive(torch.float32).squeeze(1).expand_as(wanted), torch.where(wanted, 0.0, low))


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("kv_heads", [4, 2])
def test_fused_eager_and_flex_attention_agree_with_a_softmax_under_the_predicate(rule, padded, packed, kv_heads):
    module = Attention.Config(num_heads=4, num_kv_heads=kv_heads, rope=None).build(
        hidden_size=32, num_modalities=3, layer_idx=0
    )
    mask, allowed = mask_of(rule, padded=padded, packed=packed), wanted_mask(rule, padded, packed)
    query, key, value = torch.randn(2, 4, 9, 8), torch.randn(2, kv_heads, 9, 8), torch.randn(2, kv_heads, 9, 8)
    spread = [part.repeat_interleave(4 // kv_heads, 1) for part in (key, value)]
    scores = (query @ spread[0].transpose(2, 3) / 8**0.5).masked_fill(~allowed.unsqueeze(1), float("-inf"))
    wanted = scores.softmax(-1) @ spread[1]

    found, none = scaled_dot_product(module, query, key, value, mask)
    torch.testing.assert_close(found.transpose(1, 2), wanted)
    assert none is None
    found, weights = eager(module, query, key, value, mask)
    torch.testing.assert_close(found.transpose(1, 2), wanted)
    torch.testing.assert_close(weights, scores.softmax(-1))
    flexed = flex_attention(query, key, value, block_mask=mask.flex(), scale=module.scaling, enable_gqa=kv_heads != 4)
    torch.testing.assert_close(flexed, wanted)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("kv_heads", [4, 2])
def test_training_in_bfloat16_attends_as_float64_does(rule, kv_heads):
    # short rows take another way on a CPU, where the fused kernel's backward is slow
    module = Attention.Config(num_heads=4, num_kv_heads=kv_heads, rope=None).build(
        hidden_size=32, num_modalities=3, layer_idx=0
    )
    mask = mask_of(rule, padded=True, packed=True)
    given = [torch.randn(2, heads, 9, 8).bfloat16() for heads in (4, kv_heads, kv_heads)]
    grad = torch.randn(2, 9, 4, 8).bfloat16()

    def attended(dtype):
        parts = [part.to(dtype).requires_grad_() for part in given]
        found, none = scaled_dot_product(module, *parts, mask)
        assert none is None
        return [found, *torch.autograd.grad(found, parts, grad.to(dtype))]

    for found, wanted in zip(attended(torch.bfloat16), attended(torch.float64), strict=True):
        assert (found.double() - wanted).norm() <= 1e-2 * wanted.norm()


@pytest.mark.parametrize("rule", ["causal", "bidirectional"])
def test_queries_after_a_cache_see_what_the_last_rows_of_the_whole_mask_say(rule):
    for padded in (False, True):
        whole = mask_of(rule, padded=padded).dense()
        assert torch.equal(mask_of(rule, padded=padded, past=5).dense(), whole[:, :, 5:])


def test_a_block_that_a_cache_already_holds_is_seen_causally():
    found = mask_of("block_causal", past=4).dense()
    assert torch.equal(found, mask_of("block_causal").dense()[:, :, 4:])


def test_no_row_is_empty():
    for rule in RULES:
        assert mask_of(rule, padded=True, packed=True).dense().any(-1).all()


def plain(rule: str, query_length: int, key_length: int, past: int, **changes) -> AttentionMask:
    return AttentionMask(
        rule=rule, query_length=query_length, key_length=key_length, past_length=past, device=torch.device("cpu"),
        key_ids=torch.zeros(1, query_length, dtype=torch.int64), **changes,
    )  # fmt: skip


def test_no_mask_is_made_only_where_every_query_may_see_every_key():
    assert plain("causal", 1, 5, 4).needs_no_mask
    assert plain("bidirectional", 5, 5, 0).needs_no_mask
    assert not plain("causal", 2, 5, 3).needs_no_mask
    assert not plain("causal", 1, 5, 4, valid=torch.ones(1, 5, dtype=torch.bool)).needs_no_mask
    assert not plain("bidirectional", 5, 5, 0, segment_ids=torch.zeros(1, 5, dtype=torch.int64)).needs_no_mask
    assert not plain("one_way", 1, 5, 4).needs_no_mask
    assert not plain("block_causal", 5, 5, 0).is_plain_causal


def test_empty_places_of_a_cache_of_fixed_size_are_hidden():
    step = plain("causal", 1, 8, 4)
    assert not step.needs_no_mask
    assert step.dense().squeeze().tolist() == [True] * 5 + [False] * 3


def test_a_rule_of_ones_own_is_used():
    @MASK_RULES.register("window_test")
    def window(query, key):
        return (query.order >= key.order) & (query.order - key.order < 2)

    try:
        found = plain("window_test", 4, 4, 0).dense().squeeze()
        assert torch.equal(found, torch.ones(4, 4).tril().triu(-1).bool())
    finally:
        MASK_RULES.remove("window_test")


@pytest.mark.parametrize(
    ("rule", "facts"),
    [("causal", ()), ("bidirectional", ()), ("block_causal", ()), ("prefix", ()), ("one_way", ("key_ids",))],
)
def test_what_a_rule_reads_that_no_cache_keeps_is_known(rule, facts):
    assert uncached_facts(rule) == facts
    assert is_causal_rule(rule) == (rule in ("causal", "one_way"))


def test_a_rule_of_ones_own_declares_itself_and_is_found_out_where_it_does_not():
    @register_mask_rule("own_key_test")
    def own_key(query, key):
        return (query.order >= key.order) & (query.key_ids == key.key_ids)

    @register_mask_rule("own_block_test", is_causal=True)
    def own_block(query, key):
        return (query.order >= key.order) & (query.block_ids == key.block_ids)

    @register_mask_rule("declared_test", is_causal=True, reads_key_ids=True, blocks_only_add=True)
    def declared(query, key):
        return (query.order >= key.order) & (key.block_ids < 9)

    try:
        assert uncached_facts("own_key_test") == ("key_ids",)
        assert uncached_facts("own_block_test") == ("block_ids",)
        assert uncached_facts("declared_test") == ("key_ids",)
        assert [is_causal_rule(f"{name}_test") for name in ("own_key", "own_block", "declared")] == [False, True, True]
    finally:
        for name in ("own_key", "own_block", "declared"):
            MASK_RULES.remove(f"{name}_test")


def test_a_mask_that_hides_nothing_is_none():
    shared = {"rule": "block_causal", "query_length": 3, "past_length": 2, "key_length": 5}
    shared |= {"device": torch.device("cpu"), "key_ids": torch.zeros(1, 3, dtype=torch.int64)}
    whole = AttentionMask(**shared, block_ids=torch.full((1, 3), -2))
    assert whole.shown() is None
    partly = AttentionMask(**shared, block_ids=torch.tensor([[-1, 1, 1]]))
    assert torch.equal(partly.shown(), partly.dense())

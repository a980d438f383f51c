"""A last layer that is asked for the ends of sequences alone gives what it gives among all rows."""

from __future__ import annotations

import pytest
import torch

from omnimoe.inputs import InputError
from omnimoe.layers import MASK_RULES, Attention, AttentionMask
from omnimoe.layers.masks import uncached_facts
from tests.declarations import CACHED, DECLARATIONS, DENSE, MOT, build, ids_like

CLOSE = {"atol": 2e-5, "rtol": 1e-4}


def counted_rows(model) -> list[int]:
    """How many rows the experts of the last layer see, call by call."""
    seen: list[int] = []
    model.model.backbone.layers[-1].mlp.register_forward_hook(lambda part, given, out: seen.append(len(given[0])))
    return seen


@torch.no_grad()
@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("name", list(DECLARATIONS))
def test_the_last_logits_are_those_of_the_whole(name, count):
    config = DECLARATIONS[name]
    model, ids = build(config), ids_like(config)
    mask = torch.ones_like(ids)
    mask[0, :4] = mask[1, -2:] = 0
    for given in ({}, {"attention_mask": mask}):
        wanted = model(ids, **given).logits[:, -count:]
        torch.testing.assert_close(model(ids, **given, logits_to_keep=count).logits, wanted, **CLOSE)


@torch.no_grad()
@pytest.mark.parametrize("name", CACHED)
def test_what_is_left_out_is_in_the_cache(name):
    config = DECLARATIONS[name]
    model, ids = build(config), ids_like(config)
    wanted, cache = model(ids).logits, None
    for start, stop, count in ((0, 5, 1), (5, 6, 1), (6, 10, 2), (10, len(ids[0]), 1)):
        out = model(ids[:, start:stop], past_key_values=cache, use_cache=True, logits_to_keep=count)
        cache = out.past_key_values
        torch.testing.assert_close(out.logits, wanted[:, stop - count : stop], **CLOSE)


@torch.no_grad()
@pytest.mark.parametrize("rule", list(MASK_RULES))
@pytest.mark.parametrize("past", [0, 3])
def test_the_mask_of_the_last_queries_is_the_end_of_the_mask(rule, past):
    if past and uncached_facts(rule):
        pytest.skip("has no cached decoding")
    keys = torch.tensor([[0, 1, 1, 0, 1], [1, 1, 0, 0, 0]])
    for blocks in (None, torch.tensor([[0, 0, -1, 1, 1], [-1, 0, 0, 0, -1]])):
        whole = AttentionMask(
            rule=rule,
            query_length=5,
            key_length=5 + past,
            past_length=past,
            device=torch.device("cpu"),
            valid=torch.arange(5 + past).expand(2, -1) > torch.tensor([[1], [-1]]),
            key_ids=keys,
            block_ids=blocks,
        )
        assert torch.equal(whole.last(2).dense(), whole.dense()[:, :, -2:])
        assert torch.equal(whole.last(2).additive(torch.float32), whole.additive(torch.float32)[:, :, -2:])


@torch.no_grad()
def test_only_what_is_read_goes_through_the_last_layer():
    model, ids = build(MOT), ids_like(MOT)
    batch, length = ids.shape
    seen = counted_rows(model)
    model(ids, logits_to_keep=2)
    model(ids)
    assert seen == [2 * batch, length * batch]


@pytest.mark.parametrize(
    "asks",
    [
        {"output_hidden_states": True},
        {"output_attentions": True},
        {"output_router_logits": True},
    ],
    ids=lambda asks: next(iter(asks)),
)
def test_whoever_asks_for_all_rows_gets_them(asks):
    config = DENSE
    model, ids = build(config), ids_like(config)
    seen = counted_rows(model)
    with torch.no_grad():
        out = model(ids, logits_to_keep=1, **asks)
    assert seen == [ids.numel()]
    assert out.logits.shape[1] == 1
    if out.hidden_states is not None:
        assert all(held.shape[:2] == ids.shape for held in out.hidden_states)


def test_a_gradient_and_a_router_see_all_rows():
    for config in (DENSE, DECLARATIONS["moe"]):
        model, ids = build(config), ids_like(config)
        seen = counted_rows(model)
        with torch.set_grad_enabled(config is DENSE):
            model(ids, logits_to_keep=1)
        assert seen == [ids.numel()]


@torch.no_grad()
def test_attention_of_another_form_is_not_asked():
    model, ids = build(DENSE), ids_like(DENSE)
    wanted = model(ids, logits_to_keep=1).logits

    class Forward(Attention):
        def forward(self, x, rows, mask, cache=None):
            return super().forward(x, rows, mask, cache)

    class Attend(Attention):
        def _attend(self, query, key, value, mask):
            return super()._attend(query, key, value, mask)

    seen = counted_rows(model)
    for kind in (Forward, Attend):
        model.model.backbone.layers[-1].self_attn.__class__ = kind
        torch.testing.assert_close(model(ids, logits_to_keep=1).logits, wanted, **CLOSE)
    assert seen == [ids.numel()] * 2


@torch.no_grad()
def test_the_stack_alone_keeps_what_it_is_told_to():
    for name in ("mot", "moe"):
        config = DECLARATIONS[name]
        model, ids = build(config), ids_like(config)
        whole = model.model(ids).last_hidden_state
        torch.testing.assert_close(model.model(ids, hidden_to_keep=2).last_hidden_state, whole[:, -2:], **CLOSE)
        assert model.model(ids, hidden_to_keep=99).last_hidden_state.shape == whole.shape
        with pytest.raises(InputError, match="hidden_to_keep counts the last positions, got -1"):
            model.model(ids, hidden_to_keep=-1)


@torch.no_grad()
def test_a_number_below_zero_is_what_it_is_in_transformers():
    model, ids = build(DENSE), ids_like(DENSE)
    assert torch.equal(model(ids, logits_to_keep=-3).logits, model(ids).logits[:, 3:])

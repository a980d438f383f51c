"""What holds for experts' choice and for groups by modality, whatever the weights.

The load of an expert is exact, padding and other modalities change nothing, an empty modality has zero gradients, and
balance is 1 at uniform routing: test_expert_choice.py, test_by_modality.py, test_balance.py. Causality: test_models.py.
"""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from omnimoe.layers import RowLayout
from omnimoe.routers import ByModalityRouter, ExpertChoiceRouter, TopKRouter
from tests.declarations import DENSE, build, ids_like, routed


def moma(experts=(2, 3, 1), router=None, **changes):
    inner = router or ExpertChoiceRouter.Config()
    choice = ByModalityRouter.Config(experts=experts, router=inner, gate_lone_expert=True)
    return DENSE.replace(experts=routed(sum(experts), choice), **changes)


@settings(max_examples=15)
@given(seed=st.integers(0, 1000), factor=st.sampled_from([0.5, 1.0, 1.5]))
def test_the_choices_of_a_group_are_capacity_times_its_tokens(seed, factor):
    """The sum of all choices is c * E * T, but for rounding up each expert's share."""
    generator = torch.Generator().manual_seed(seed)
    keys = torch.randint(0, 3, (2, 9), generator=generator)
    rows = RowLayout.build(keys, num_keys=3)
    config = ByModalityRouter.Config(
        experts=(2, 3, 1), router=ExpertChoiceRouter.Config(capacity_factor=factor), gate_lone_expert=True
    )
    routing = config.build(hidden_size=4, num_experts=6, num_modalities=3)(torch.randn(18, 4), rows)
    load = torch.bincount(routing.expert_ids, minlength=6).tolist()
    for key, (first, count) in enumerate(((0, 2), (2, 3), (5, 1))):
        tokens = int((keys == key).sum())
        each = min(tokens, math.ceil(factor * tokens / count))
        assert load[first : first + count] == [each] * count


@pytest.mark.parametrize("placement", ["pre", "post"])
def test_a_token_without_experts_goes_through_the_residual_alone(placement):
    config = moma(router=ExpertChoiceRouter.Config(capacity_factor=0.4), norm_placement=placement, num_layers=1)
    model = build(config)
    seen = {}
    layer = model.model.backbone.layers[0]
    layer.register_forward_hook(lambda module, given, out: seen.update(out=out))
    layer.mlp.register_forward_hook(lambda module, given, out: seen.update(mlp=out))
    layer.self_attn.register_forward_hook(lambda module, given, out: seen.update(mixed=out))
    layer.register_forward_pre_hook(lambda module, given: seen.update(x=given[0], rows=given[1]))
    out = model(ids_like(config))
    taken = set(out.routings[0].token_index.tolist())
    left = [row for row in range(24) if row not in taken]
    assert left
    mixed = seen["mixed"][0] if isinstance(seen["mixed"], tuple) else seen["mixed"]
    if placement == "post":
        mixed = layer.attention_norm(mixed, seen["rows"])
    torch.testing.assert_close(seen["out"][0][left], (seen["x"] + mixed)[left])
    assert not seen["mlp"][0][left].any()


@pytest.mark.parametrize("placement", ["pre", "post"])
def test_copies_of_one_expert_are_it_times_the_sum_of_weights_which_a_norm_behind_them_hides(placement):
    """So a dense seed and the mixture grown from it agree under a norm on the branch, and not otherwise."""
    dense = build(moma(experts=(1, 1, 1), norm_placement=placement))
    for layer in dense.model.backbone.layers:
        for router in layer.mlp.router.routers:
            router.scorer.weight.data.zero_()  # every gate is one half
    config = moma(router=ExpertChoiceRouter.Config(capacity_factor=4.0), norm_placement=placement)
    grown = build(config)
    state = dense.state_dict()
    for key in grown.state_dict():
        if "mlp.experts" in key:
            seed = torch.tensor([0, 0, 1, 1, 1, 2])
            grown.get_parameter(key).data.copy_(state[key][seed])
        elif "router" not in key:
            grown.get_parameter(key).data.copy_(state[key])
    ids = ids_like(config)
    out = grown(ids)
    for layer, routing, held in zip(
        grown.model.backbone.layers, out.routings, dense.model.backbone.layers, strict=True
    ):
        assert len(routing.token_index.unique()) == 24
        x, rows = torch.randn(24, 16), out.rows
        mixed, chosen = layer.mlp(x, rows)
        total = torch.zeros(24).index_add(0, chosen.token_index, chosen.expert_weights)
        torch.testing.assert_close(mixed, total.unsqueeze(1) * 2 * held.mlp(x, rows)[0], atol=1e-5, rtol=1e-4)
    agrees = torch.allclose(out.logits, dense(ids).logits, atol=2e-3)
    assert agrees == (placement == "post")


SEATED = TopKRouter.Config(top_k=1, capacity_factor=1.0, capacity_pool="sequence")


@pytest.mark.parametrize("inner", [ExpertChoiceRouter.Config(), TopKRouter.Config(top_k=1), SEATED])
def test_rows_sorted_once_are_what_masks_in_every_layer_give(inner):
    config = moma(router=inner)
    layer = config.experts.build(hidden_size=16, num_modalities=3, layer_idx=0)
    for parameter in layer.parameters():
        parameter.data.normal_(std=0.3)
    keys = torch.randint(0, 3, (2, 12), generator=torch.Generator().manual_seed(0))
    rows, x = RowLayout.build(keys, num_keys=3), torch.randn(2, 12, 16)
    found = rows.to_time(layer(rows.to_rows(x), rows)[0])
    wanted = torch.zeros_like(x)
    for key in range(3):
        mask = keys == key
        own = RowLayout.build(torch.full_like(keys, key), num_keys=3, valid=mask)
        wanted[mask] = layer(x[mask], own)[0]
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("pool", ["batch", "sequence"])
@pytest.mark.parametrize("in_order", [True, False])
def test_the_room_of_an_expert_is_of_its_own_modality_whatever_else_the_batch_holds(pool, in_order):
    """Rows of a key are all alike, so they ask for one expert, which seats its share of them and no more."""
    counts = torch.tensor([[6, 0, 4], [3, 7, 0]]) if not in_order else torch.tensor([[8, 2, 0], [0, 4, 6]])
    keys = torch.stack([torch.repeat_interleave(torch.arange(3), row) for row in counts])
    rows = RowLayout.build(keys, num_keys=3)
    assert (rows.time_index is None) == in_order
    config = ByModalityRouter.Config(experts=(2, 2, 2), router=SEATED.replace(capacity_pool=pool))
    router = config.build(hidden_size=4, num_experts=6, num_modalities=3)
    x = torch.ones(20, 4)
    load = torch.bincount(router(x, rows).expert_ids.clamp_min(-1) + 1, minlength=7)[1:].view(3, 2)
    shares = counts if pool == "sequence" else counts.sum(0, keepdim=True)
    assert load.amax(-1).tolist() == (shares / 2).ceil().long().sum(0).tolist()
    assert not load.amin(-1).any()

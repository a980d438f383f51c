"""Soft experts: against a loop, against the peer's module, and what padding and other keys may not change."""

from __future__ import annotations

import dataclasses

import pytest
import torch
import torch.nn.functional as F

from omnimoe.config import ConfigError
from omnimoe.experts import RoutedExperts
from omnimoe.layers import RowLayout
from omnimoe.routers import ByModalityRouter, SoftRouter, TopKRouter
from tests.declarations import DENSE, build, ids_like, routed

KEYS = torch.tensor([[0, 1, 0, 1, 1, 0], [1, 1, 0, 0, 1, 0]])
VALID = torch.tensor([[True] * 6, [True, True, False, True, True, False]])


def make(num_experts: int = 3, num_slots: int = 2, experts=(), **fields) -> RoutedExperts:
    router = SoftRouter.Config(num_slots=num_slots, experts=experts)
    config = RoutedExperts.Config(num_experts=num_experts, intermediate_size=12, router=router, **fields)
    layer = config.build(hidden_size=8, num_modalities=2, layer_idx=0)
    for parameter in layer.parameters():
        parameter.data.normal_(std=0.4)
    layer.router.scale.data.fill_(3.0)
    return layer


def expert(layer: RoutedExperts, number: int, x: torch.Tensor) -> torch.Tensor:
    gate, up = F.linear(x, layer.experts.gate_up_proj[number]).chunk(2, -1)
    return F.linear(F.silu(gate) * up, layer.experts.down_proj[number])


def looped(layer: RoutedExperts, x: torch.Tensor, keys: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
    """Slot by slot and row by row, ``(B, T, D)``."""
    y = torch.zeros_like(x)
    owner = [key for key, count in enumerate(layer.router.config.experts) for _ in range(count)]
    slots = [(e, s) for e in range(layer.config.num_experts) for s in range(layer.router.config.num_slots)]
    for batch in range(len(x)):
        rows = [t for t in range(x.shape[1]) if valid[batch, t]]

        def score(t: int, slot: tuple[int, int], x=x[batch]) -> torch.Tensor:
            direction = layer.router.slots[slot]
            return layer.router.scale * (x[t] / x[t].norm()) @ (direction / direction.norm())

        def meets(t: int, slot: tuple[int, int], keys=keys[batch]) -> bool:
            return not owner or owner[slot[0]] == int(keys[t])

        out = {}
        for slot in slots:
            mixed = [t for t in rows if meets(t, slot)]
            if mixed:
                shares = torch.stack([score(t, slot) for t in mixed]).softmax(0)
                out[slot] = expert(layer, slot[0], sum(p * x[batch, t] for p, t in zip(shares, mixed, strict=True)))
        for t in rows:
            mine = [slot for slot in slots if meets(t, slot)]
            shares = torch.stack([score(t, slot) for slot in mine]).softmax(0)
            y[batch, t] = sum(p * out[slot] for p, slot in zip(shares, mine, strict=True))
    return y


@pytest.mark.parametrize("experts", [(), (1, 2)], ids=["all rows", "by key"])
@pytest.mark.parametrize("sort", [True, False])
@pytest.mark.parametrize("padded", [True, False])
def test_it_is_the_loop_over_slots_and_rows(experts, sort, padded):
    layer, x = make(experts=experts), torch.randn(2, 6, 8)
    valid = VALID if padded else torch.ones_like(VALID)
    rows = RowLayout.build(KEYS, num_keys=2, valid=VALID if padded else None, sort=sort)
    y, routing = layer(rows.to_rows(x), rows)
    torch.testing.assert_close(rows.to_time(y), looped(layer, x, KEYS, valid), atol=1e-5, rtol=1e-4)
    shares = torch.zeros(len(rows)).index_add(0, routing.token_index, routing.expert_weights)
    torch.testing.assert_close(shares, torch.ones(len(rows)))


def test_experts_of_a_key_do_not_feel_rows_of_another_and_all_get_gradients():
    layer, rows, x = make(experts=(1, 2)), RowLayout.build(KEYS, num_keys=2), torch.randn(2, 6, 8)
    wanted, _ = layer(rows.to_rows(x), rows)
    changed = x.masked_fill((KEYS == 1).unsqueeze(-1), 5.0)
    found, _ = layer(rows.to_rows(changed), rows)
    own = rows.key_ids == 0
    torch.testing.assert_close(found[own], wanted[own])
    alone = RowLayout.build(torch.zeros_like(KEYS), num_keys=2)
    y, routing = layer(alone.to_rows(x), alone)
    y.square().sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in layer.parameters())
    assert not layer.experts.down_proj.grad[1:].any()
    assert set(routing.expert_ids.tolist()) == {0, -1}


def test_the_peer_gives_the_same():
    soft_moe_pytorch = pytest.importorskip("soft_moe_pytorch", reason="pip install --no-deps soft-moe-pytorch")
    peer = soft_moe_pytorch.SoftMoE(dim=8, num_slots=2, num_experts=3, is_distributed=False, geglu=False)
    layer = make(activation="gelu", gated=False)
    # the peer normalises its rows to length sqrt(D) and learns a scale for each channel, here one; it has biases
    layer.router.scale.data.fill_(8.0)
    peer.slot_embeds.data.copy_(layer.router.slots.data)
    for number, network in enumerate(peer.experts.experts):
        into, out = (module for module in network if isinstance(module, torch.nn.Linear))
        into.weight.data[:12].copy_(layer.experts.gate_up_proj[number])
        into.weight.data[12:] = 0
        out.weight.data.zero_()
        out.weight.data[:, :12].copy_(layer.experts.down_proj[number])
        into.bias.data.zero_()
        out.bias.data.zero_()
    x = F.normalize(torch.randn(2, 6, 8), dim=-1) * 8**0.5
    rows = RowLayout.build(torch.zeros(2, 6, dtype=torch.int64), num_keys=1)
    y, _ = layer(rows.to_rows(x), rows)
    torch.testing.assert_close(rows.to_time(y), peer(x), atol=1e-5, rtol=1e-4)


def test_it_is_not_causal_and_refuses_a_cache():
    layer = make()
    assert not layer.config.is_causal
    assert not layer.config.has_causal_form
    rows = RowLayout.build(KEYS, num_keys=2, routes_causally=True)
    with pytest.raises(ValueError, match="mixes all rows of a sequence"):
        layer(torch.randn(12, 8), rows)


def test_experts_must_fit_the_keys():
    with pytest.raises(ConfigError, match=r"\(1, 1\) must give each of 2 keys a number and sum to the bank's 3"):
        make(experts=(1, 1))
    with pytest.raises(ConfigError, match=r"\(1, 1, 1\) must give each of 2 keys"):
        make(experts=(1, 1, 1))


def test_pools_and_shared_experts_stand_beside_it():
    """Experts of two widths give what two banks do, slot by slot; shared ones are added."""
    layer = make(num_experts=3, pools=((1, 12), (2, 6)), num_shared_experts=1)
    rows, x = RowLayout.build(KEYS, num_keys=2), torch.randn(2, 6, 8)
    given = rows.to_rows(x)
    y, routing = layer(given, rows)
    mixed = torch.einsum("best,btd->besd", routing.slots.dispatch, x)
    weights = [bank for pool in layer.experts.pools for bank in zip(pool.gate_up_proj, pool.down_proj, strict=True)]
    out = []
    for number, (into, back) in enumerate(weights):
        gate, up = F.linear(mixed[:, number], into).chunk(2, -1)
        out.append(F.linear(F.silu(gate) * up, back))
    wanted = rows.to_rows(torch.einsum("btes,besd->btd", routing.slots.combine, torch.stack(out, 1)))
    shared = layer.shared_experts(given, torch.tensor([12], dtype=torch.int32))
    torch.testing.assert_close(y, wanted + shared, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("experts", [(), (1, 2)], ids=["all rows", "by key"])
def test_documents_of_a_packed_row_are_mixed_apart(experts):
    layer, x = make(experts=experts), torch.randn(2, 6, 8)
    documents = torch.tensor([[0, 0, 1, 1, 1, 2], [0, 0, 0, 1, 1, -1]])
    valid = documents >= 0
    rows = RowLayout.build(KEYS, num_keys=2, valid=valid)
    rows = dataclasses.replace(rows, document_ids=rows.to_rows(documents))
    found = rows.to_time(layer(rows.to_rows(x), rows)[0])
    for batch in range(2):
        for document in range(int(documents[batch].max()) + 1):
            own = documents[batch] == document
            keys = KEYS[batch, own].unsqueeze(0)
            alone = RowLayout.build(keys, num_keys=2)
            wanted = alone.to_time(layer(alone.to_rows(x[batch, own].unsqueeze(0)), alone)[0])
            torch.testing.assert_close(found[batch, own], wanted[0], atol=1e-5, rtol=1e-4)


def test_a_model_keeps_documents_apart():
    config = DENSE.replace(experts=routed(3, SoftRouter.Config(num_slots=2)))
    model, ids = build(config), ids_like(config)
    segments = torch.tensor([[0] * 5 + [1] * 7] * 2)
    packed = model(ids, segment_ids=segments).logits
    for part in (slice(0, 5), slice(5, 12)):
        torch.testing.assert_close(packed[:, part], model(ids[:, part]).logits, atol=1e-5, rtol=1e-4)
    out = model(ids, segment_ids=segments * 10_000)
    assert torch.equal(out.logits, packed)
    assert out.routings[0].slots.dispatch.shape == (2, 3, 2 * 2, 12)  # by the documents there are, not by their ids


def test_what_it_cannot_have_is_refused():
    with pytest.raises(ConfigError, match="weights_on='input' scales rows.*SoftRouter"):
        make(weights_on="input")
    with pytest.raises(ConfigError, match="SoftRouter.Config chooses among the experts of the bank alone"):
        make(num_zero_experts=1)
    with pytest.raises(ConfigError, match=r"take SoftRouter.Config\(experts=\(1, 2\)\) in the place of ByModality"):
        ByModalityRouter.Config(experts=(1, 2), router=SoftRouter.Config())
    assert ByModalityRouter.Config(experts=(1, 2), router=TopKRouter.Config()).most_experts_per_token(3) == 2

"""The whole model in one graph: a training step and a step of decoding, with nothing left to Python."""

from __future__ import annotations

import pytest
import torch
from torch._dynamo.testing import CompileCounter
from transformers import CompileConfig, StaticCache

from tests.declarations import DECLARATIONS, build, ids_like

QUICK = ("mot", "moma_top_k")
KINDS = ("dense", "moe", "moma", "mot", "moma_top_k", "pools", "chameleon", "block_causal", "mot_hybrid", "static")
KINDS += ("attention_experts", "attention_heads")


def kinds(*names: str) -> list:
    """Those that run always, and those that are left out unless asked for."""
    return [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in names]


@pytest.fixture(autouse=True)
def _no_graphs() -> None:
    torch._dynamo.reset()


@pytest.mark.parametrize("kind", kinds(*KINDS))
def test_a_training_step_is_one_graph_and_the_same(kind):
    whole, traced = build(DECLARATIONS[kind]).train(), build(DECLARATIONS[kind]).train()
    ids = ids_like(DECLARATIONS[kind])
    mask = torch.ones_like(ids)
    mask[0, :3], mask[1, -2:] = 0, 0
    counter = CompileCounter()
    step = torch.compile(traced, fullgraph=True, backend=counter)
    # padding is dropped by one and kept by the other, which must not change what is learned or counted
    wanted = whole(ids, labels=ids, attention_mask=mask, output_router_logits=True)
    found = step(ids, labels=ids, attention_mask=mask, output_router_logits=True)
    assert counter.frame_count == 1
    torch.testing.assert_close(found.loss, wanted.loss)
    torch.testing.assert_close(found.logits[mask.bool()], wanted.logits[mask.bool()], atol=1e-5, rtol=1e-4)
    for name, loss in wanted.losses.items():
        torch.testing.assert_close(found.losses[name], loss)
    for kept, dropped in zip(found.router_logits or (), wanted.router_logits or (), strict=True):
        torch.testing.assert_close(kept[mask.flatten().bool()], dropped, atol=1e-5, rtol=1e-4)
    wanted.loss.backward()
    found.loss.backward()
    for (name, one), other in zip(whole.named_parameters(), traced.parameters(), strict=True):
        torch.testing.assert_close(other.grad, one.grad, atol=1e-5, rtol=1e-3, msg=name)
    # what adapts outside of the gradient reads a traced routing as it reads any
    whole.update_routers(wanted.routings)
    traced.update_routers(found.routings)
    for (name, one), other in zip(whole.named_buffers(), traced.buffers(), strict=True):
        torch.testing.assert_close(other, one, msg=name)


@pytest.mark.parametrize("kind", kinds("dense", "mot", "moe", "moma_top_k", "moma"))
def test_a_step_of_decoding_is_one_graph_for_every_position(kind):
    config = DECLARATIONS[kind]
    model, ids = build(config).requires_grad_(False), ids_like(config)
    counter = CompileCounter()
    step = torch.compile(model, fullgraph=True, backend=counter)
    caches = [StaticCache(config=config, max_cache_len=16) for _ in range(2)]
    for cache in caches:
        model(ids[:, :7], past_key_values=cache)
    for place in range(7, 12):
        wanted = model(ids[:, place : place + 1], past_key_values=caches[0]).logits
        found = step(ids[:, place : place + 1], past_key_values=caches[1]).logits
        torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-4)
    assert counter.frame_count == 1


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["dense", "mot", "moma_top_k"])
def test_generation_with_a_cache_of_fixed_size_compiles_its_steps(kind):
    config = DECLARATIONS[kind]
    model, ids = build(config), ids_like(config)[:, :6]
    mask = torch.ones_like(ids)
    mask[0, :2] = 0
    settings = {"attention_mask": mask, "max_new_tokens": 6, "do_sample": False}
    traced = []

    def counting(graph, inputs):  # the config of a compilation is copied, and what is no function with it
        traced.append(graph)
        return graph.forward

    compiling = CompileConfig(fullgraph=True, backend=counting, mode=None)
    compiling._compile_all_devices = True
    found = model.generate(ids, cache_implementation="static", compile_config=compiling, **settings)
    assert traced
    assert torch.equal(found, model.generate(ids, **settings))


@pytest.mark.parametrize("kind", kinds("dense", "mot", "moe"))
def test_one_graph_serves_every_size(kind):
    config = DECLARATIONS[kind]
    model = build(config).requires_grad_(False)
    counter = CompileCounter()
    traced = torch.compile(model, fullgraph=True, dynamic=True, backend=counter)
    for batch_size, length in ((2, 12), (3, 7), (5, 20)):
        ids = ids_like(config, batch_size, length)
        torch.testing.assert_close(traced(ids).logits, model(ids).logits, atol=1e-5, rtol=1e-4)
    assert counter.frame_count == 1


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["mot", "moe", "moma_top_k"])
def test_inductor_makes_the_same_of_it(kind):
    ids = ids_like(DECLARATIONS[kind])
    whole, traced = build(DECLARATIONS[kind]).train(), build(DECLARATIONS[kind]).train()
    wanted = whole(ids, labels=ids).loss
    found = torch.compile(traced, fullgraph=True)(ids, labels=ids).loss
    torch.testing.assert_close(found, wanted)
    wanted.backward()
    found.backward()
    for (name, one), other in zip(whole.named_parameters(), traced.named_parameters(), strict=True):
        torch.testing.assert_close(other[1].grad, one.grad, atol=1e-5, rtol=1e-3, msg=name)


@pytest.mark.slow
def test_continuous_rows_are_placed_in_a_graph():
    config = DECLARATIONS["transfusion"]
    model, ids = build(config), ids_like(config)
    ids[:, 4:7] = 7
    given = {"features": {"latent": torch.randn(6, 6)}, "timesteps": {"latent": torch.full((6,), 0.5)}}
    wanted = model(ids, targets={"latent": torch.zeros(6, 6)}, **given)
    found = torch.compile(model, fullgraph=True, backend="eager")(ids, targets={"latent": torch.zeros(6, 6)}, **given)
    torch.testing.assert_close(found.loss, wanted.loss)
    torch.testing.assert_close(found.predictions["latent"], wanted.predictions["latent"], atol=1e-5, rtol=1e-4)
